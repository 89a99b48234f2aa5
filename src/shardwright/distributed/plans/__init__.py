"""Hand-tuned plans, one small file per family.

A file in this folder registers itself: it names the model types it is for (``MODEL_TYPES``) and the styles of their
modules (``STYLES``, globs below the text model). A plan belongs here only where it beats the one that transformers
brings along; say in its docstring how.
"""

from __future__ import annotations

import pkgutil
from functools import cache
from importlib import import_module

from shardwright.errors import PlanError


@cache
def optimized_plans() -> dict[str, tuple[str, dict[str, str]]]:
    """Model type -> (family, styles), from every file in this folder.

    Raises:
        PlanError: two files claim the same model type.
    """
    plans: dict[str, tuple[str, dict[str, str]]] = {}
    for info in pkgutil.iter_modules(__path__):
        family = import_module(f"{__name__}.{info.name}")
        for model_type in family.MODEL_TYPES:
            if model_type in plans:
                raise PlanError(f"Both plans/{plans[model_type][0]}.py and plans/{info.name}.py claim {model_type!r}.")
            plans[model_type] = (info.name, dict(family.STYLES))
    return plans
