"""Which modules Megatron-FSDP gathers and releases together."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import nn

from shardwright.distributed.models.blocks import block_names
from shardwright.distributed.models.imports import import_classes_from_paths
from shardwright.errors import ConfigError

logger = logging.getLogger(__name__)


def unit_classes(
    model: nn.Module, chosen: Sequence[str | type[nn.Module]] | None, blocks: Sequence[str] | None = None
) -> list[type[nn.Module]]:
    """The classes whose modules are units.

    Args:
        chosen: classes or dotted paths to them; None takes those of ``blocks``, or, where there are none, the whole
            model as one unit.
        blocks: names of the modules that can be units; None takes the model's repeated blocks.

    Raises:
        ConfigError: none of ``chosen`` can be imported, or none of them is in the model.
    """
    if chosen is None:
        names = block_names(model) if blocks is None else blocks
        return list(dict.fromkeys(type(model.get_submodule(name)) for name in names)) or [type(model)]
    if isinstance(chosen, str):
        raise ConfigError(f"nvfsdp_unit_modules is the string {chosen!r}; it must be a list of class paths.")
    classes = _import(chosen)
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


def _import(chosen: Sequence[str | type[nn.Module]]) -> list[type[nn.Module]]:
    """The module classes among ``chosen``; others are skipped with a warning that names them."""
    found = []
    for item in chosen:
        for cls in import_classes_from_paths([item]) if isinstance(item, str) else [item]:
            if isinstance(cls, type) and issubclass(cls, nn.Module):
                found.append(cls)
            else:
                logger.warning("Skipped %r: it is not a module class.", item)
    return found
