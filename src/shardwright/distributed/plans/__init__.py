"""Hand-tuned plans, one small file per family.

A file in this folder registers itself: it names the model types it is for (``MODEL_TYPES``), the styles of their
modules (``STYLES``, globs below the text model) and the attributes that become rank-local (``LOCAL_ATTRIBUTES``, may be
empty). A plan belongs here only where it beats the one that transformers
brings along; say in its docstring how.
"""

from __future__ import annotations

import pkgutil
from dataclasses import dataclass
from functools import cache
from importlib import import_module

from shardwright.errors import PlanError


@dataclass(frozen=True)
class FamilyPlan:
    """A hand-tuned plan; globs are relative to the text model."""

    family: str
    styles: dict[str, str]
    local_attributes: dict[str, tuple[str, ...]]


@cache
def optimized_plans() -> dict[str, FamilyPlan]:
    """Model type -> plan, from every file in this folder.

    Raises:
        PlanError: two files claim the same model type.
    """
    plans: dict[str, FamilyPlan] = {}
    for info in pkgutil.iter_modules(__path__):
        module = import_module(f"{__name__}.{info.name}")
        plan = FamilyPlan(info.name, module.STYLES, module.LOCAL_ATTRIBUTES)
        for model_type in module.MODEL_TYPES:
            if model_type in plans:
                raise PlanError(
                    f"Both plans/{plans[model_type].family}.py and plans/{info.name}.py claim {model_type!r}."
                )
            plans[model_type] = plan
    return plans
