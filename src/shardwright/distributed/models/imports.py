"""Objects at dotted paths."""

from __future__ import annotations

import logging
from importlib import import_module
from typing import Any

from shardwright.errors import ConfigError

logger = logging.getLogger(__name__)


class PathError(ConfigError, ImportError):
    """A dotted path that leads nowhere."""


def import_class_from_path(name: str) -> Any:
    """The object at a dotted path such as ``"torch.optim.AdamW"``; nested attributes work.

    Raises:
        PathError: naming the part of the path that could not be found.
    """
    if not isinstance(name, str) or not name or not all(part.isidentifier() for part in name.split(".")):
        raise PathError(f"{name!r} is not a dotted path such as 'torch.optim.AdamW'.")
    parts = name.split(".")
    found: Any = None
    depth = 0
    for depth in range(1, len(parts) + 1):
        path = ".".join(parts[:depth])
        try:
            found = import_module(path)
        except ModuleNotFoundError as error:
            if error.name is None or not (path == error.name or path.startswith(f"{error.name}.")):
                raise PathError(f"Importing {path!r} of {name!r} failed: {error}.") from error
            depth -= 1
            break
        except (ImportError, SyntaxError, OSError) as error:  # a broken module, or one whose library does not load
            raise PathError(f"Importing {path!r} of {name!r} failed: {error}.") from error
    if depth == 0:
        raise PathError(f"There is no module {parts[0]!r} (in {name!r}).")
    for at in range(depth, len(parts)):
        try:
            found = getattr(found, parts[at])
        except (AttributeError, ImportError) as error:  # transformers imports a class when it is asked for
            raise PathError(f"{'.'.join(parts[:at])!r} has no {parts[at]!r} (in {name!r}).") from error
    return found


def import_classes_from_paths(class_paths: list[str]) -> list[Any]:
    """The objects at several dotted paths; one that cannot be imported is skipped, with a warning that names it."""
    found = []
    for path in class_paths:
        try:
            found.append(import_class_from_path(path))
        except PathError as error:
            logger.warning("Skipped %r: %s", path, error)
    return found
