"""Repeated blocks: which entries of a model's module lists are alike, so that one stands for all.

A *signature* is everything about a block that its code can depend on: classes, parameter shapes, and the flags and
names in its attributes (``layer_type="sliding"``). Blocks with one signature get one answer.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from dataclasses import dataclass, field

from torch import nn


@dataclass
class RepeatedList:
    """One list of blocks.

    Attributes:
        kinds: for each original entry, which signature it has (numbered from 0).
        kept: the original entries that the truncated list holds, in order.
    """

    kinds: list[int]
    kept: list[int]

    def place_of(self, index: int) -> int:
        """Where the entry that stands for ``index`` is in the truncated list: itself, or the last of its kind."""
        if index in self.kept:
            return self.kept.index(index)
        return max(place for place, kept in enumerate(self.kept) if self.kinds[kept] == self.kinds[index])


@dataclass
class Repeats:
    """The lists of a model, by the original name of the list."""

    lists: dict[str, RepeatedList] = field(default_factory=dict)

    def truncate(self, model: nn.Module) -> None:
        """Drop the entries of ``model`` that are not kept."""
        for name, repeated in self.lists.items():
            if len(repeated.kept) == len(repeated.kinds):
                continue
            owner, _, attribute = name.rpartition(".")
            blocks = model.get_submodule(name)
            short = type(blocks)() if isinstance(blocks, nn.ModuleList) else nn.Sequential()
            for index, entry in enumerate(repeated.kept):
                short.add_module(str(index), blocks._modules[str(entry)])
            model.get_submodule(owner)._modules[attribute] = short

    def dropped(self, model: nn.Module) -> list[nn.Module]:
        """The entries of the original that a truncated model does not hold, but for those that it holds elsewhere."""
        blocks = {
            name: [model.get_submodule(f"{name}.{index}") for index in range(len(repeated.kinds))]
            for name, repeated in self.lists.items()
        }
        kept = {id(entries[index]) for name, entries in blocks.items() for index in self.lists[name].kept}
        return [entry for entries in blocks.values() for entry in entries if id(entry) not in kept]

    def original_name(self, name: str) -> str:
        """The original name of a module of the truncated model."""
        seen: list[str] = []
        for part in name.split("."):
            repeated = self.lists.get(".".join(seen)) if part.isdigit() else None
            seen.append(part if repeated is None else str(repeated.kept[int(part)]))
        return ".".join(seen)

    def stand_in(self, original: str) -> str:
        """The name in the truncated model of the module that stands for an original one: itself, or one of its kind."""
        seen: list[str] = []
        out: list[str] = []
        for part in original.split("."):
            repeated = self.lists.get(".".join(seen)) if part.isdigit() else None
            out.append(part if repeated is None else str(repeated.place_of(int(part))))
            seen.append(part)
        return ".".join(out)

    def kind_of(self, original: str) -> str:
        """An original name with the index of every repeated entry replaced by its kind's number: ``layers.{0}.mlp``."""
        seen: list[str] = []
        out: list[str] = []
        for part in original.split("."):
            repeated = self.lists.get(".".join(seen)) if part.isdigit() else None
            out.append(part if repeated is None else f"{{{repeated.kinds[int(part)]}}}")
            seen.append(part)
        return ".".join(out)

    def glob(self, original: str) -> str:
        """An original name with the index of every repeated entry replaced by ``*``."""
        return re.sub(r"\{\d+\}", "*", self.kind_of(original))


def find_repeats(model: nn.Module, keep: int | None) -> Repeats:
    """The module lists of ``model`` that hold blocks of one class; ``keep`` of each kind stay when truncated."""
    repeats = Repeats()
    outer: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or not name:
            continue
        blocks = list(module._modules.values())
        if len(blocks) < 2 or any(b is None or not any(True for _ in b.parameters()) for b in blocks):
            continue
        if len({type(b) for b in blocks if b is not None}) > 3:
            continue  # a pipeline of different steps, not repeated blocks
        signatures = [signature(block) for block in blocks if block is not None]
        numbers = {s: number for number, s in enumerate(dict.fromkeys(signatures))}
        kinds = [numbers[s] for s in signatures]
        inner = any(name.startswith(o + ".") for o in outer)
        kept = list(range(len(kinds)))
        if keep is not None and not inner and not isinstance(module, nn.Sequential):
            kept = [i for i in kept if kinds[:i].count(kinds[i]) < keep]
        outer.append(name)
        repeats.lists[name] = RepeatedList(kinds, kept)
    return repeats


def signature(module: nn.Module) -> Hashable:
    """Equal for two modules that run the same code on the same shapes."""
    flags = tuple((k, v) for k, v in sorted(module.__dict__.items()) if isinstance(v, (bool, str)))
    shapes = tuple((k, None if p is None else tuple(p.shape)) for k, p in module._parameters.items())
    children = tuple((k, None if m is None else signature(m)) for k, m in module._modules.items())
    return type(module), flags, shapes, children
