"""What to change about a layout: settings that make it fit, or faster while it fits. Each is estimated, not guessed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from shardwright.distributed.config import ParallelConfig
from shardwright.distributed.replay.reading import ModelReading
from shardwright.errors import ShardwrightError
from shardwright.estimate.estimating import Estimate, estimate
from shardwright.estimate.trace.tracer import Tracer
from shardwright.estimate.workload import Workload

_LEAST_GAIN = 0.01  # of the tokens per second
_TILES = 8
_LESS = {"full": "selective", "selective": "none"}


@dataclass(frozen=True)
class Change:
    """Another layout, or another way to work in it.

    Attributes:
        words: what to type, such as ``"activation_checkpointing=full"`` or ``"--batch-size 2"``.
        made: what comes of it.
    """

    words: str
    made: Estimate

    def to_dict(self) -> dict[str, Any]:
        return {
            "change": self.words,
            "fits": self.made.fits,
            "memory_needed": self.made.memory,
            "tokens_per_second_per_gpu": self.made.speed.tokens_per_second,
        }


Step = tuple[ParallelConfig, Workload]
_FLAGS = {"batch_size": "--batch-size", "accumulation": "--accumulation", "optimizer": "--optimizer"}


def best_change(found: Estimate, reading: ModelReading, tracer: Tracer) -> Change | None:
    """What to change about ``found``; None where nothing that was tried is better.

    A layout that does not fit gets changes one on top of the other until it does, or until there are no more; the last
    is handed back either way. One that fits gets the fastest of those that are one change away, and fit.

    Args:
        tracer: that ``found`` was made with.
    """

    def made(step: Step) -> Estimate | None:
        try:
            with _quietly():
                return estimate(reading, *step, found.machine, gpus=found.config.least_world_size, tracer=tracer)
        except ShardwrightError:
            return None  # a layout that this model cannot have is no advice

    return _faster(found, made) if found.fits else _smaller(found, made)


@contextmanager
def _quietly() -> Iterator[None]:
    """What planning has to tell about a layout that nobody asked for is not told."""
    logger = logging.getLogger("shardwright")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _faster(found: Estimate, made: Callable[[Step], Estimate | None]) -> Change | None:
    least = found.speed.tokens_per_second * (1 + _LEAST_GAIN)
    tried = [each for each in map(made, _speeding(found)) if each is not None and each.fits]
    best = max(tried, key=lambda each: each.speed.tokens_per_second, default=None)
    if best is None or best.speed.tokens_per_second < least:
        return None
    return Change(_words(found, best), best)


def _speeding(found: Estimate) -> Iterator[Step]:
    config, work = found.config, found.workload
    if less := _LESS.get(config.activation_checkpointing):
        yield config.with_(activation_checkpointing=less), work
    if config.reshard_after_forward == "default" and found.speed.exposed > _LEAST_GAIN * found.speed.step:
        yield config.with_(reshard_after_forward="never"), work
    if work.accumulation % 2:
        return
    yield config, replace(work, batch_size=work.batch_size * 2, accumulation=work.accumulation // 2)
    if found.speed.collectives["tp"] > _LEAST_GAIN * found.speed.step and config.ep == 1:
        tp = config.tp // 2
        fewer = config.with_(tp=tp, dp_shard=config.dp_shard * 2, sequence_parallel=config.sequence_parallel and tp > 1)
        yield fewer, replace(work, accumulation=work.accumulation // 2)


def _smaller(found: Estimate, made: Callable[[Step], Estimate | None]) -> Change | None:
    last = found
    for relief in _RELIEFS:
        step = relief(last)
        tried = made(step) if step is not None else None
        if tried is None or tried.memory >= last.memory:
            continue
        last = tried
        if tried.fits:
            break
    return None if last is found else Change(_words(found, last), last)


def _tiles(found: Estimate) -> Step | None:
    outside = not found.peak.where and found.config.loss_tiles == 1
    return (found.config.with_(loss_tiles=_TILES), found.workload) if outside else None


def _recompute(found: Estimate) -> Step | None:
    config = found.config
    if config.activation_checkpointing == "full":
        return None
    return config.with_(activation_checkpointing="full"), found.workload


def _smaller_batch(found: Estimate) -> Step | None:
    work = found.workload
    if work.batch_size % 2:
        return None
    return found.config, replace(work, batch_size=work.batch_size // 2, accumulation=work.accumulation * 2)


def _no_replicas(found: Estimate) -> Step | None:
    config = found.config
    if config.dp_replicate == 1:
        return None
    return config.with_(dp_shard=config.dp_shard * config.dp_replicate, dp_replicate=1), found.workload


def _more_tensor_parallel(found: Estimate) -> Step | None:
    """Within a node, out of the ranks that shard; a step has as many sequences as before."""
    config, work = found.config, found.workload
    if config.dp_shard % 2 or config.tp * 2 > found.machine.device.gpus_per_node or config.ep > 1:
        return None
    more = config.with_(tp=config.tp * 2, dp_shard=config.dp_shard // 2, sequence_parallel=True)
    return more, replace(work, accumulation=work.accumulation * 2)


def _eight_bits(found: Estimate) -> Step | None:
    if not found.workload.optimizer.startswith("adamw") or found.workload.optimizer == "adamw_8bit":
        return None
    return found.config, replace(found.workload, optimizer="adamw_8bit")


_RELIEFS: tuple[Callable[[Estimate], Step | None], ...] = (
    _recompute, _tiles, _smaller_batch, _no_replicas, _more_tensor_parallel, _tiles, _eight_bits,
)  # fmt: skip
"""From what costs least to what costs most. The peak moves as others shrink, so the loss is looked at twice."""


def _words(found: Estimate, made: Estimate) -> str:
    """What to type for ``made``, where it is not as ``found``: keys of the sharding, then options."""
    was, now = found.config.to_dict(), made.config.to_dict()
    keys = [f"{key}={_typed(value)}" for key, value in now.items() if was[key] != value]
    before, after = found.workload.to_dict(), made.workload.to_dict()
    return " ".join([*keys, *(f"{flag} {after[name]}" for name, flag in _FLAGS.items() if before[name] != after[name])])


def _typed(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
