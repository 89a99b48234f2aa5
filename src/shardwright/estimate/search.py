"""``search``: the layouts of a model on so many GPUs, those that fit, the best first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from shardwright.distributed.config import ParallelConfig
from shardwright.distributed.planning.experts import experts_of
from shardwright.distributed.planning.listed_experts import listed_experts
from shardwright.distributed.replay.reading import ModelReading
from shardwright.errors import ConfigError, ShardwrightError
from shardwright.estimate.estimating import Estimate, assembled
from shardwright.estimate.hardware import Machine
from shardwright.estimate.subject import Subject
from shardwright.estimate.trace.tracer import Traced, Tracer
from shardwright.estimate.trace.whole import scaled
from shardwright.estimate.workload import Workload

OBJECTIVES: dict[str, Callable[[Estimate], float]] = {
    "speed": lambda made: made.speed.step,
    "memory": lambda made: made.memory,
    "cost": lambda made: made.speed.step * made.config.least_world_size,
}
"""What is least in the best layout: seconds of a step, bytes of a rank, seconds of all GPUs together."""
_MICRO_BATCHES = (1, 2, 4, 8)
_CHECKPOINTING = ("full", "selective", "none")  # each keeps more than the one before
_CONTEXTS = (1, 2, 4, 8)
_LEAST_PART = 8192  # tokens of a sequence on a context-parallel rank
SEARCHED = ("tp", "cp", "ep", "dp_shard", "dp_replicate", "sequence_parallel", "activation_checkpointing")
_EXPOSED = 0.01  # of a step: waiting for FSDP2 that is worth keeping parameters gathered for


@dataclass
class Search:
    """What a search found.

    Attributes:
        fitting: estimates of the layouts that fit, the best first.
        too_large: those that do not fit, the one that needs the least memory first.
        left_out: how many were not looked at, because one that needs less memory does not fit.
        refused: sentences about layouts that the model cannot have, and how many there are of each.
        objective: one of :data:`OBJECTIVES`.
    """

    fitting: list[Estimate] = field(default_factory=list)
    too_large: list[Estimate] = field(default_factory=list)
    left_out: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    objective: str = "speed"

    @property
    def nearest(self) -> Estimate | None:
        """Of those that do not fit, the one that needs the least memory."""
        return self.too_large[0] if self.too_large else None

    @property
    def next_better(self) -> Estimate | None:
        """Of those that would be better than the best that fits, the one that needs the least memory."""
        if not self.fitting:
            return None
        cost = OBJECTIVES[self.objective]
        return next((made for made in self.too_large if cost(made) < cost(self.fitting[0])), None)


def search(
    reading: ModelReading, workload: Workload, machine: Machine, *, gpus: int, global_batch: int, objective: str,
    base: ParallelConfig,
) -> Search:  # fmt: skip
    """Estimate every layout that is worth a look.

    A trace is made for each size of tp, cp and ep and way of checkpointing, of one sequence; micro-batches of several
    are taken to keep and compute so many times as much. What is sure not to fit, because a layout that needs less
    memory does not, is not traced. More context-parallel ranks are tried where something does not fit with fewer, or
    where there are more data-parallel ranks than sequences.

    Args:
        workload: sequences and optimizer; its batch is not read.
        gpus: how many; for the objective ``"cost"`` the most: halves of them are tried, too.
        global_batch: sequences of a step, on all ranks.
        objective: one of :data:`OBJECTIVES`.
        base: settings that all layouts have.

    Raises:
        ConfigError: no such objective, ``base`` has a setting that is searched, or no layout can have this batch.
    """
    if objective not in OBJECTIVES:
        raise ConfigError(f"objective is {objective!r}; it must be one of {', '.join(OBJECTIVES)}.")
    if fixed := [name for name in SEARCHED if getattr(base, name) != getattr(ParallelConfig(), name)]:
        raise ConfigError(
            f"suggest searches {', '.join(fixed)}, which cannot be given beside. Leave out what is searched, or ask "
            "about one layout: shardwright estimate."
        )
    looking = _Looking(_Maker(reading, machine), workload, global_batch, Search(objective=objective))
    for count in _counts(gpus) if objective == "cost" else [gpus]:
        looking.at_all(base, count, _expert_ranks(reading))
    found = looking.found
    if not looking.tried:
        raise ConfigError(
            f"global_batch is {global_batch} sequences, which cannot be dealt out evenly by any layout of {gpus} GPUs "
            f"with at most {machine.device.gpus_per_node} of them per model. Take a larger batch, or fewer GPUs."
        )
    found.fitting.sort(key=OBJECTIVES[objective])
    found.too_large.sort(key=OBJECTIVES["memory"])
    return found


def _counts(gpus: int) -> list[int]:
    """The number of GPUs, its half, and so on, for as long as there is an even half."""
    found = [gpus]
    while found[-1] % 2 == 0:
        found.append(found[-1] // 2)
    return found


def _expert_ranks(reading: ModelReading) -> list[int]:
    """Expert-parallel ranks: powers of two up to the number of experts; 1 where no experts can be spread."""
    found = (experts_of(module) for module in reading.modules.values())
    counts = [experts.count for experts in found if experts is not None]
    most = min(counts + [listed.count for listed in listed_experts(reading)], default=1)
    return [2**power for power in range(most.bit_length()) if 2**power <= most]


@dataclass
class _Looking:
    """A search in progress.

    Attributes:
        tried: how many layouts could have the batch.
    """

    maker: _Maker
    workload: Workload
    global_batch: int
    found: Search
    tried: int = 0

    def at_all(self, base: ParallelConfig, gpus: int, expert_ranks: list[int]) -> None:
        """Tensor parallelism, and experts' ranks, inside a node."""
        node = min(self.maker.machine.device.gpus_per_node, gpus)
        for tp in _powers(gpus):
            for ep in expert_ranks:
                if max(tp, ep) <= node:
                    self.at_contexts(base.with_(tp=tp, ep=ep, sequence_parallel=tp > 1), gpus, node)

    def at_contexts(self, base: ParallelConfig, gpus: int, node: int) -> None:
        """Context-parallel ranks, until all that is tried fits; each has a part of a sequence that is worth it."""
        for cp in _CONTEXTS if base.ep == 1 else (1,):
            if cp > 1 and self.workload.seq_len < cp * _LEAST_PART:
                return
            roomy = [self.at_checkpointing(config) for config in _shardings(base.with_(cp=cp), gpus, node)]
            if any(roomy):
                return

    def at_checkpointing(self, config: ParallelConfig) -> bool:
        """Whether there is room for every way of checkpointing."""
        for place, mode in enumerate(_CHECKPOINTING):
            full = self.at_batches(config.with_(activation_checkpointing=mode))
            if full is None or (mode == _CHECKPOINTING[0] and not self.has_room_for_products(config, full)):
                self.found.left_out += len(_CHECKPOINTING) - place - 1
                return False
        return True

    def has_room_for_products(self, config: ParallelConfig, full: Estimate) -> bool:
        """Whether what selective checkpointing keeps at least, the results of products, fits beside what always is."""
        always = full.peak.parts["parameters"] + full.peak.parts["optimizer"] + full.overheads.context
        kept = self.maker.products(config.with_(activation_checkpointing=_CHECKPOINTING[0]), self.workload)
        return always + kept <= full.machine.device.memory

    def at_batches(self, config: ParallelConfig) -> Estimate | None:
        """The smallest micro-batch, where it fits. Larger ones take more memory."""
        first = None
        works = list(_workloads(config, self.workload, self.global_batch))
        self.tried += len(works)
        for place, work in enumerate(works):
            try:
                made = self.maker.estimate(config, work)
            except ShardwrightError as error:
                reason = str(error).partition(". ")[0]
                self.found.refused[reason] = self.found.refused.get(reason, 0) + 1
                return None
            if not made.fits:
                self.found.too_large.append(made)
                self.found.left_out += len(works) - place - 1
                return first
            self.found.fitting.append(made)
            first = first or made
            self.at_resharding(config, work, made)
        return first

    def at_resharding(self, config: ParallelConfig, work: Workload, made: Estimate) -> None:
        """Parameters that stay gathered after forward are not gathered again, where gathers are waited for."""
        if config.reshard_after_forward != "default" or made.speed.exposed < _EXPOSED * made.speed.step:
            return
        kept = self.maker.estimate(config.with_(reshard_after_forward="never"), work)
        self.tried += 1
        (self.found.fitting if kept.fits else self.found.too_large).append(kept)


def _powers(gpus: int) -> list[int]:
    """The powers of two that divide ``gpus``."""
    return [2**power for power in range(gpus.bit_length()) if gpus % 2**power == 0]


def _shardings(base: ParallelConfig, gpus: int, node: int) -> Iterator[ParallelConfig]:
    """Shards and replicas: replicas of at least a node each."""
    for replicas in _powers(gpus):
        shards, rest = divmod(gpus, base.tp * base.cp * replicas)
        model = shards * base.cp * base.tp
        if not rest and shards and (replicas == 1 or model >= node) and model % base.ep == 0:
            yield base.with_(dp_shard=shards, dp_replicate=replicas)


def _workloads(config: ParallelConfig, workload: Workload, global_batch: int) -> Iterator[Workload]:
    own, rest = divmod(global_batch, config.data_ranks)
    for micro in _MICRO_BATCHES if own and not rest else ():
        if own % micro == 0:
            yield replace(workload, batch_size=micro, accumulation=own // micro)


@dataclass
class _Maker:
    """Estimates that share readings, decisions and traces."""

    reading: ModelReading
    machine: Machine
    tracer: Tracer = field(default_factory=Tracer)
    subjects: dict[str, Subject | ShardwrightError] = field(default_factory=dict)
    alike: dict[str, Subject] = field(default_factory=dict)  # one for each way to split a model

    def estimate(self, config: ParallelConfig, work: Workload) -> Estimate:
        subject = self.subject(config)
        one = self.tracer.trace(subject, replace(work, batch_size=1, accumulation=1))
        traced = Traced(tuple(scaled(part, work.batch_size) for part in one.parts), one.why_not)
        return assembled(subject, work, self.machine, traced)

    def products(self, config: ParallelConfig, workload: Workload) -> int:
        """Bytes of the results of all matrix products and attentions in the blocks, for one sequence."""
        parts = self.tracer.trace(self.subject(config), replace(workload, batch_size=1, accumulation=1)).parts
        forward = [part.segment for part in parts if part.where and not part.segment.backward]
        return sum(kernel.written * count for segment in forward for kernel, count in segment.kernels.items())

    def subject(self, config: ParallelConfig) -> Subject:
        """The decisions do not depend on how many data-parallel ranks there are, but on whether there are any."""
        casts_or_shards = config.averaging_ranks > 1
        split = repr((config.tp, config.cp, config.ep, config.sequence_parallel))
        key = repr(config.with_(dp_shard=1, dp_replicate=1)) + str(casts_or_shards)
        if key not in self.subjects:
            try:
                made = Subject.of(self.reading, config, config.least_world_size, self.alike.get(split))
                self.subjects[key] = self.alike[split] = made
            except ShardwrightError as error:
                self.subjects[key] = error
        known = self.subjects[key]
        if isinstance(known, ShardwrightError):
            raise known
        degrees = {"dp_shard": config.dp_shard, "dp_replicate": config.dp_replicate}
        return replace(known, config=known.config.with_(**degrees))
