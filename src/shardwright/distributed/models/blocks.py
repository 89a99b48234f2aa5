"""Repeated blocks, found by structure rather than by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from torch import nn


def owns_parameters(module: nn.Module) -> bool:
    """Whether the module itself (not a child) has parameters."""
    return any(param is not None for param in module._parameters.values())


def is_norm(module: nn.Module) -> bool:
    """Whether a module looks like a norm: a leaf that owns nothing but vectors."""
    own = [param for param in module._parameters.values() if param is not None]
    return bool(own) and not list(module.children()) and all(param.ndim <= 1 for param in own)


def is_block(module: nn.Module) -> bool:
    """Whether an entry of a list is a block: it has children that own parameters, not parameters alone."""
    return any(owns_parameters(child) for child in module.modules() if child is not module)


def block_names(model: nn.Module) -> list[str]:
    """The names of the repeated blocks, in the model's order: of decoders, encoders and towers alike.

    A block is an entry of an ``nn.ModuleList`` (or of an ``nn.ModuleDict`` with numbered entries, as pipeline stages
    have) that holds more than a single layer, or one of several entries of one class in an ``nn.Sequential``. Where the
    entries are stages made of blocks, the blocks are taken.
    """
    names: list[str] = []
    seen: set[int] = set()
    _collect(model, "", names, seen)
    return names


def shared_parts(model: nn.Module, blocks: Iterable[str]) -> list[list[str]]:
    """The largest modules inside different ``blocks`` that hold the same parameters (Zamba's shared transformer).

    Returns:
        The names of the modules of every such set.
    """
    holders: dict[frozenset[int], dict[str, str]] = {}
    for block in blocks:
        for name, part in model.get_submodule(block).named_modules(prefix=block):
            if key := frozenset(id(param) for param in part.parameters()):
                holders.setdefault(key, {}).setdefault(block, name)
    groups: list[list[str]] = []
    covered: set[int] = set()
    for key, by_block in sorted(holders.items(), key=lambda item: -len(item[0])):
        if len(by_block) > 1 and not key & covered:
            covered |= key
            groups.append(list(by_block.values()))
    return groups


def by_list(names: Iterable[str], blocks: Sequence[str]) -> dict[str, list[str]]:
    """``names`` of blocks, or of parts of them, by the list that their block is in."""
    lists: dict[str, list[str]] = {}
    for name in names:
        around = next(block for block in blocks if f"{name}.".startswith(f"{block}."))
        lists.setdefault(around.rpartition(".")[0], []).append(name)
    return lists


def every_nth(lists: Mapping[str, list[str]], n: int) -> list[str]:
    """Every ``n``-th name of each list, counted from its first; all of them for 1, none for 0."""
    return [name for names in lists.values() for name in names[n - 1 :: n]] if n else []


def _collect(module: nn.Module, path: str, names: list[str], seen: set[int]) -> None:
    repeated = _repeated_classes(module)
    for name, child in module.named_children():
        below = f"{path}.{name}" if path else name
        if type(child) not in repeated or not is_block(child) or _is_sequence(child) or _is_stage(child):
            _collect(child, below, names, seen)
        elif id(child) not in seen:
            seen.add(id(child))
            names.append(below)


def _is_sequence(module: nn.Module) -> bool:
    return bool(_repeated_classes(module))


def _repeated_classes(module: nn.Module) -> set[type[nn.Module]]:
    """The classes of those children of a list that can be blocks; none for a module that is no list."""
    classes = Counter(type(child) for child in module.children())
    if isinstance(module, nn.ModuleList):
        return set(classes)
    if isinstance(module, nn.ModuleDict):
        return set(classes) if all(key.isdigit() for key in module) else set()
    if isinstance(module, nn.Sequential):  # its other entries may be an embedding, a head, an activation
        alike = {type(child) for child in module.children() if is_block(child)}
        return {cls for cls in alike if classes[cls] > 1}
    return set()


def _is_stage(entry: nn.Module) -> bool:
    """Whether most of an entry's parameters lie in lists whose own entries have norms: then those are the blocks.

    Experts come in lists, too: few have norms, and a router chooses among them.
    """
    inside = [
        below
        for child in entry.modules()
        if _is_sequence(child) and not routes_to(child, entry)
        for below in child.children()
        if is_block(below) and any(is_norm(part) for part in below.modules())
    ]
    return bool(inside) and 2 * _size(inside) > _size([entry])


def routes_to(listed: nn.Module, owner: nn.Module) -> bool:
    """Whether ``owner`` has a matrix with a row for each module of a list in it, outside of them: a router."""
    inside, count = {id(param) for param in listed.parameters()}, len(list(listed.children()))
    return any(param.ndim == 2 and param.shape[0] == count for param in owner.parameters() if id(param) not in inside)


def _size(modules: Iterable[nn.Module]) -> int:
    unique = {id(param): param.numel() for module in modules for param in module.parameters()}
    return sum(unique.values())


def numbers_to_globs(name: str) -> str:
    """A dotted name with its numbers replaced by ``*``: the glob that repeated modules share."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
