"""Compiling the blocks, one by one: one graph serves all blocks of a kind, and FSDP2's hooks stay outside of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn


def apply_compile(model: nn.Module, blocks: Iterable[str], **options: Any) -> None:
    """Compile the named blocks in place; ``options`` are those of ``torch.compile``. Names do not change."""
    for name in blocks:
        model.get_submodule(name).compile(**options)
