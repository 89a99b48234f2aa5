"""What an estimate is about: a model that has been read, and what is decided for it under a config."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch

from shardwright.distributed.config import ParallelConfig
from shardwright.distributed.planning.decide import Split
from shardwright.distributed.planning.decided import DecidedPlan
from shardwright.distributed.planning.layout import ParameterLayout, parameter_layouts
from shardwright.distributed.precision import Precision
from shardwright.distributed.replay.reading import ModelReading
from shardwright.estimate.predict import decided_plan, dtypes_of
from shardwright.estimate.units import UnitBytes, unit_bytes


@dataclass(frozen=True)
class Subject:
    """A model under one config.

    Attributes:
        config: with all degrees and the precision settled.
        decided: what :func:`shardwright.parallelize` would do.
        layouts: of its parameters, in the model's order.
    """

    reading: ModelReading
    config: ParallelConfig
    decided: DecidedPlan
    layouts: tuple[ParameterLayout, ...] = field(repr=False)

    @classmethod
    def of(cls, reading: ModelReading, config: ParallelConfig, ranks: int, alike: Subject | None = None) -> Subject:
        """The model on so many ranks.

        Args:
            alike: the same model under a config with the same tp, cp and ep and the same plan: how its ranks share the
                work of a model is not decided again.

        Raises:
            ConfigError, PlanError, UnsupportedError: as :func:`shardwright.parallelize`.
        """
        degrees = config.degrees(ranks)
        whole = parameter_layouts(reading, None).values()
        settled = config.with_(dp_shard=degrees.dp_shard, precision=config.precision.settled(dtypes_of(whole)))
        decided = decided_plan(reading, settled, split=None if alike is None else Split.of(alike.decided))
        layouts = parameter_layouts(reading, decided.tensor, decided.experts)
        return cls(reading, settled, decided, tuple(layouts.values()))

    @cached_property
    def units(self) -> dict[str, UnitBytes]:
        """FSDP2's units that hold parameters; none without FSDP2."""
        data = self.decided.data
        if data is None:
            return {}
        return {name: unit for name, unit in unit_bytes(self.layouts, data, self.config).items() if unit.gathered}

    @cached_property
    def compute(self) -> torch.dtype:
        """The dtype that a step computes in."""
        precision = self.config.precision
        return getattr(torch, dtypes_of(self.layouts)[0] if precision == Precision() else precision.param)

    @property
    def cast(self) -> torch.dtype | None:
        """The dtype that parameters are cast to for a step; None where nothing is."""
        return None if self.config.precision == Precision() else self.compute

    @property
    def output(self) -> torch.dtype | None:
        """The dtype that outputs are cast to; None where they are not."""
        precision = self.config.precision
        return None if precision == Precision() else getattr(torch, precision.output)

    @property
    def ranks(self) -> int:
        return self.config.least_world_size

    @property
    def data_parallel(self) -> int:
        """Ranks that work on batches of their own."""
        return self.config.data_ranks
