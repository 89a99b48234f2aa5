"""Reference code of state-space layers works on the sequence in chunks, and pads it to a multiple of them.

A trial has a handful of tokens. Chunks of 256 make its tensors thousands of times larger than they need to be, and
planning Falcon-H1 takes minutes. The size of a chunk changes no result: that it does not is checked, not believed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn

ATTRIBUTE = "chunk_size"
SHORT = 4  # shorter than a trial's sequence, so that more than one chunk takes part


def chunked_modules(model: nn.Module) -> dict[nn.Module, int]:
    """The modules that state the size of a chunk which is larger than a trial needs, with that size."""
    sizes = {module: module.__dict__.get(ATTRIBUTE) for module in model.modules()}
    return {module: size for module, size in sizes.items() if type(size) is int and size > SHORT}


def set_chunks(sizes: Mapping[nn.Module, int]) -> None:
    """Give these modules chunks of these sizes, in place."""
    for module, size in sizes.items():
        module.__dict__[ATTRIBUTE] = size


def short(sizes: Mapping[nn.Module, int]) -> dict[nn.Module, int]:
    """The same modules, with short chunks."""
    return dict.fromkeys(sizes, SHORT)


@contextmanager
def chunks_of(sizes: Mapping[nn.Module, int]) -> Iterator[None]:
    """The modules have these sizes inside, and short chunks again behind."""
    set_chunks(sizes)
    try:
        yield
    finally:
        set_chunks(short(sizes))
