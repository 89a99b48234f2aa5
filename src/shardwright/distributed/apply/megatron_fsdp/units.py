"""Which modules Megatron-FSDP gathers and releases together."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib import import_module

from torch import nn

from shardwright.distributed.models.structure import block_names
from shardwright.errors import ConfigError

logger = logging.getLogger(__name__)


def unit_classes(model: nn.Module, chosen: Sequence[str | type[nn.Module]] | None) -> list[type[nn.Module]]:
    """The classes whose modules are units.

    Args:
        chosen: classes or dotted paths to them; None takes the model's repeated blocks, or, where it has none, the
            whole model as one unit.

    Raises:
        ConfigError: none of ``chosen`` can be imported, or none of them is in the model.
    """
    if chosen is None:
        blocks = list(dict.fromkeys(type(model.get_submodule(name)) for name in block_names(model)))
        return blocks or [type(model)]
    if isinstance(chosen, str):
        raise ConfigError(f"nvfsdp_unit_modules is the string {chosen!r}; it must be a list of class paths.")
    classes = [found for item in chosen if (found := _class_at(item)) is not None]
    if not classes:
        raise ConfigError(
            f"None of nvfsdp_unit_modules = {list(chosen)} can be imported as a module class, so there would be no "
            "units. Correct the paths, or leave it out to take the model's repeated blocks."
        )
    present = [cls for cls in classes if any(isinstance(module, cls) for module in model.modules())]
    for cls in classes:
        if cls not in present:
            logger.warning("%s has no module of class %s; it is skipped.", type(model).__name__, cls.__qualname__)
    if not present:
        raise ConfigError(
            f"{type(model).__name__} has no module of any class in nvfsdp_unit_modules "
            f"({', '.join(cls.__qualname__ for cls in classes)}), so there would be no units. Leave it out to take the "
            "model's repeated blocks."
        )
    return present


def _class_at(path: str | type[nn.Module]) -> type[nn.Module] | None:
    """The module class at a dotted path; None, with a warning that names it, where there is none."""
    if not isinstance(path, str):
        return path
    module, _, name = path.rpartition(".")
    try:
        found = vars(import_module(module)).get(name) if module else None
    except ImportError as error:
        logger.warning("The unit class %s is skipped: %s.", path, error)
        return None
    if isinstance(found, type) and issubclass(found, nn.Module):
        return found
    logger.warning("The unit class %s is skipped: it is not a module class.", path)
    return None
