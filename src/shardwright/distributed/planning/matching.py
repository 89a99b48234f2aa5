"""The refusal of a glob that matches nothing."""

from __future__ import annotations

import difflib
from collections.abc import Collection

from torch import nn

from shardwright.distributed.models.blocks import numbers_to_globs
from shardwright.errors import PlanError


def require_match(glob: str, found: Collection[str], model: nn.Module, source: str) -> None:
    """Raise PlanError where ``glob`` of a plan from ``source`` found nothing in ``model``; says what is close to it."""
    if found:
        return
    names = [name for name, _ in (*model.named_modules(), *model.named_parameters(remove_duplicate=False)) if name]
    close = difflib.get_close_matches(glob, sorted({numbers_to_globs(name) for name in names}), n=3)
    raise PlanError(
        f"{glob!r} in the plan ({source}) matches no module and no parameter of {type(model).__name__}."
        + (f" Did you mean {' or '.join(map(repr, close))}?" if close else "")
    )
