"""``search``: the layouts of a model on so many GPUs, those that fit, the best first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import product

from shardwright.distributed.config import ParallelConfig
from shardwright.distributed.planning.experts import experts_of
from shardwright.distributed.replay.reading import ModelReading
from shardwright.errors import ConfigError, ShardwrightError
from shardwright.estimate.estimating import Estimate, assembled
from shardwright.estimate.hardware import Machine
from shardwright.estimate.subject import Subject
from shardwright.estimate.trace.tracer import Traced, Tracer
from shardwright.estimate.trace.whole import scaled
from shardwright.estimate.workload import Workload

OBJECTIVES = ("speed", "memory")
_MICRO_BATCHES = (1, 2, 4, 8)
_CHECKPOINTING = ("none", "selective", "full")
_CONTEXTS = (1, 2, 4, 8)
_LEAST_PART = 8192  # tokens of a sequence on a context-parallel rank


@dataclass
class Search:
    """What a search found.

    Attributes:
        fitting: estimates of the layouts that fit, the best first.
        too_large: how many do not fit.
        nearest: of those, the one that needs the least memory.
        refused: sentences about layouts that the model cannot have, and how many there are of each.
    """

    fitting: list[Estimate] = field(default_factory=list)
    too_large: int = 0
    nearest: Estimate | None = None
    refused: dict[str, int] = field(default_factory=dict)


def search(
    reading: ModelReading, workload: Workload, machine: Machine, *, gpus: int, global_batch: int, objective: str,
    base: ParallelConfig,
) -> Search:  # fmt: skip
    """Estimate every layout that is worth a look.

    A trace is made for each size of tp, cp and ep and way of checkpointing, of one sequence; micro-batches of several
    are taken to keep and compute so many times as much.

    Args:
        workload: sequences and optimizer; its batch is not read.
        global_batch: sequences of a step, on all ranks.
        objective: one of :data:`OBJECTIVES`.
        base: settings that all layouts have.

    Raises:
        ConfigError: no such objective, or no layout can have this batch.
    """
    if objective not in OBJECTIVES:
        raise ConfigError(f"objective is {objective!r}; it must be one of {', '.join(OBJECTIVES)}.")
    found, maker = Search(), _Maker(reading, workload, machine, gpus)
    tried = 0
    for config in _configs(base, machine, gpus, _contexts(workload), _expert_ranks(reading)):
        for work in _workloads(config, workload, gpus, global_batch):
            tried += 1
            try:
                made = maker.estimate(config, work)
            except ShardwrightError as error:
                reason = str(error).partition(". ")[0]
                found.refused[reason] = found.refused.get(reason, 0) + 1
                break
            _sort_in(found, made)
    if not tried:
        raise ConfigError(
            f"global_batch is {global_batch} sequences, which cannot be dealt out evenly by any layout of {gpus} GPUs "
            f"with at most {machine.device.gpus_per_node} of them per model. Take a larger batch, or fewer GPUs."
        )
    best = _fastest if objective == "speed" else _smallest
    found.fitting.sort(key=best)
    return found


def _fastest(made: Estimate) -> float:
    return made.speed.step


def _smallest(made: Estimate) -> float:
    return made.memory


def _sort_in(found: Search, made: Estimate) -> None:
    if made.fits:
        found.fitting.append(made)
        return
    found.too_large += 1
    if found.nearest is None or made.memory < found.nearest.memory:
        found.nearest = made


def _contexts(workload: Workload) -> list[int]:
    """Context-parallel ranks: those that leave each a part of a sequence that is worth a part."""
    return [cp for cp in _CONTEXTS if cp == 1 or workload.seq_len >= cp * _LEAST_PART]


def _expert_ranks(reading: ModelReading) -> list[int]:
    """Expert-parallel ranks: powers of two up to the number of experts; 1 where no experts can be spread."""
    found = (experts_of(module) for module in reading.modules.values())
    most = min((experts.count for experts in found if experts is not None), default=1)
    return [2**power for power in range(most.bit_length()) if 2**power <= most]


def _configs(
    base: ParallelConfig, machine: Machine, gpus: int, contexts: list[int], expert_ranks: list[int]
) -> Iterator[ParallelConfig]:
    """Tensor parallelism, and experts' ranks, inside a node; replicas of at least a node each; every checkpointing."""
    node = min(machine.device.gpus_per_node, gpus)
    powers = [2**power for power in range(gpus.bit_length()) if gpus % 2**power == 0]
    for tp, cp, replicas in product(powers, contexts, powers):
        shards, rest = divmod(gpus, tp * cp * replicas)
        if tp > node or rest or (replicas > 1 and shards * cp * tp < node):
            continue
        for ep, checkpointing in product(expert_ranks, _CHECKPOINTING):
            if ep > node or (shards * cp * tp) % ep or (ep > 1 and cp > 1):
                continue
            yield base.with_(
                tp=tp, cp=cp, ep=ep, dp_shard=shards, dp_replicate=replicas, sequence_parallel=tp > 1,
                activation_checkpointing=checkpointing,
            )  # fmt: skip


def _workloads(config: ParallelConfig, workload: Workload, gpus: int, global_batch: int) -> Iterator[Workload]:
    own, rest = divmod(global_batch, gpus // (config.tp * config.cp))
    for micro in _MICRO_BATCHES if own and not rest else ():
        if own % micro == 0:
            yield replace(workload, batch_size=micro, accumulation=own // micro)


@dataclass
class _Maker:
    """Estimates that share readings, decisions and traces."""

    reading: ModelReading
    workload: Workload
    machine: Machine
    gpus: int
    tracer: Tracer = field(default_factory=Tracer)
    subjects: dict[str, Subject | ShardwrightError] = field(default_factory=dict)

    def estimate(self, config: ParallelConfig, work: Workload) -> Estimate:
        subject = self.subject(config)
        one = self.tracer.trace(subject, replace(work, batch_size=1, accumulation=1))
        traced = Traced(tuple(scaled(part, work.batch_size) for part in one.parts), one.why_not)
        return assembled(subject, work, self.machine, traced)

    def subject(self, config: ParallelConfig) -> Subject:
        """The decisions do not depend on how many data-parallel ranks there are, but on whether there are any."""
        casts_or_shards = config.parameter_ranks * config.dp_replicate > 1
        key = repr(config.with_(dp_shard=1, dp_replicate=1)) + str(casts_or_shards)
        if key not in self.subjects:
            try:
                self.subjects[key] = Subject.of(self.reading, config, self.gpus)
            except ShardwrightError as error:
                self.subjects[key] = error
        known = self.subjects[key]
        if isinstance(known, ShardwrightError):
            raise known
        degrees = {"dp_shard": config.dp_shard, "dp_replicate": config.dp_replicate}
        return replace(known, config=known.config.with_(**degrees))
