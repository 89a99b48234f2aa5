"""``RankSettings``: what starting ranks, joining and watching them need to know of a run. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from shardwright.distributed.config import ParallelConfig
from shardwright.train.sections import between, one_of, positive

DEVICES = ("auto", "cpu", "cuda")
_LEAST_PHASE = 60.0  # seconds: importing torch and transformers in several ranks at once takes some


@dataclass(frozen=True)
class RankSettings:
    """The ranks of a run, whatever they do.

    Attributes:
        sharding: how a model would be spread over them.
        device: as in a training file.
        ranks: as in a training file.
        step_timeout: as in a training file.
        phase_timeout: as in a training file.
    """

    sharding: ParallelConfig = field(default_factory=ParallelConfig)
    device: str = "auto"
    ranks: int | None = None
    step_timeout: float = 1800.0
    phase_timeout: float | None = None

    def __post_init__(self) -> None:
        if self.ranks is not None:
            between("ranks", self.ranks, 1)
        one_of("device", self.device, DEVICES)
        positive("step_timeout", self.step_timeout)
        if self.phase_timeout is not None:
            positive("phase_timeout", self.phase_timeout, ", or null")

    @property
    def known_ranks(self) -> int | None:
        """How many ranks this machine would start; None: as many as it has GPUs, which torch has to count."""
        if self.ranks is not None:
            return self.ranks
        asked = self.sharding.dp_shard != -1 or self.device == "cpu"
        return self.sharding.least_world_size if asked else None

    @property
    def seconds_per_phase(self) -> float:
        """``phase_timeout``, or what stands for null there."""
        return max(self.step_timeout, _LEAST_PHASE) if self.phase_timeout is None else self.phase_timeout
