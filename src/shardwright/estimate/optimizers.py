"""What optimizers keep for every parameter, and what they need beside that while they step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod

import torch

from shardwright.distributed.planning.layout import ParameterLayout
from shardwright.errors import ConfigError

_BLOCK = 256  # elements that share a scale in bitsandbytes' 8-bit optimizers
_SMALLEST = 4096  # elements below which these keep 32 bits
_FLOAT32 = 4


@dataclass(frozen=True)
class OptimizerBytes:
    """Bytes on one rank.

    Attributes:
        state: kept between steps.
        working: beside parameters, gradients and state, while it steps.
    """

    state: int
    working: int


@dataclass(frozen=True)
class Optimizer:
    """One optimizer.

    Attributes:
        state: (shape of this rank's part, bytes of its dtype, whether Muon's rule would apply to it) -> bytes kept.
        working: how many copies of all parts are made while it steps; 0 for one that goes parameter by parameter,
            whose copies are of the largest part alone.
        alone: copies of the largest part.
        source: where the rule is written.
    """

    state: Callable[[tuple[int, ...], int, bool], int]
    working: int
    alone: int
    source: str


def _two(shape: tuple[int, ...], itemsize: int, inner: bool) -> int:
    return 2 * prod(shape) * itemsize


def _none(shape: tuple[int, ...], itemsize: int, inner: bool) -> int:
    return 0


def _one(shape: tuple[int, ...], itemsize: int, inner: bool) -> int:
    return prod(shape) * itemsize


def _eight_bits(shape: tuple[int, ...], itemsize: int, inner: bool) -> int:
    numel = prod(shape)
    return 2 * numel * _FLOAT32 if numel < _SMALLEST else 2 * (numel + -(-numel // _BLOCK) * _FLOAT32)


def _factored(shape: tuple[int, ...], itemsize: int, inner: bool) -> int:
    if len(shape) < 2:
        return prod(shape) * itemsize
    return (prod(shape[:-1]) + prod((*shape[:-2], shape[-1]))) * itemsize


def _muon(shape: tuple[int, ...], itemsize: int, inner: bool) -> int:
    return prod(shape) * itemsize * (1 if inner else 2)


OPTIMIZERS = {
    "adamw": Optimizer(_two, 1, 0, "torch.optim.AdamW, foreach: the square roots of all second averages at once"),
    "adamw_fused": Optimizer(_two, 0, 0, "torch.optim.AdamW(fused=True): one kernel, nothing beside it"),
    "adamw_loop": Optimizer(_two, 0, 2, "torch.optim.AdamW(foreach=False), which is what a CPU runs"),
    "adamw_8bit": Optimizer(_eight_bits, 0, 0, "bitsandbytes: blocks of 256 with a scale each, 32 bits below 4096"),
    "adafactor": Optimizer(_factored, 0, 2, "torch.optim.Adafactor: a row and a column for each matrix"),
    "sgd": Optimizer(_none, 0, 0, "torch.optim.SGD"),
    "sgd_momentum": Optimizer(_one, 0, 0, "torch.optim.SGD(momentum=...)"),
    "muon": Optimizer(_muon, 0, 3, "Muon on the matrices of the blocks, AdamW on the rest (Jordan 2024)"),
}


def optimizer_bytes(
    name: str,
    layouts: Iterable[ParameterLayout],
    dp_shard: int,
    *,
    blocks: Iterable[str] = (),
    state_dtype: torch.dtype | None = None,
) -> OptimizerBytes:
    """What the optimizer called ``name`` keeps for these parameters on the first rank.

    Args:
        blocks: the repeated blocks, whose matrices Muon takes.
        state_dtype: that the state is kept in; None: that of each parameter.

    Raises:
        ConfigError: there is no such optimizer.
    """
    found = OPTIMIZERS.get(name)
    if found is None:
        raise ConfigError(f"optimizer is {name!r}; it must be one of {', '.join(OPTIMIZERS)}.")
    prefixes = tuple(f"{block}." for block in blocks)
    state = total = largest = 0
    for layout in layouts:
        if not layout.trained:
            continue
        shape, size = layout.local_shape(dp_shard), (state_dtype or layout.dtype).itemsize
        inner = len(layout.shape) == 2 and layout.name.startswith(prefixes) if prefixes else False
        part = prod(shape) * layout.dtype.itemsize
        state += found.state(shape, size, inner)
        total, largest = total + part, max(largest, part)
    return OptimizerBytes(state, found.working * total + found.alone * largest)
