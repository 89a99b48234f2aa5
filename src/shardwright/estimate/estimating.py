"""``estimate``: memory, traffic and speed of one layout on one kind of machine, as data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from shardwright.distributed.config import ParallelConfig
from shardwright.distributed.models.build import build_on_meta, load_config
from shardwright.distributed.precision import DTYPES
from shardwright.distributed.replay.reading import ModelReading
from shardwright.errors import ConfigError, UnsupportedError
from shardwright.estimate.hardware import Machine
from shardwright.estimate.overheads import Overheads, overheads
from shardwright.estimate.peak import Moment, peak, reserved
from shardwright.estimate.predict import Model
from shardwright.estimate.speed import Speed, speed
from shardwright.estimate.step_memory import step_moments
from shardwright.estimate.subject import Subject
from shardwright.estimate.trace.tracer import Traced, Tracer
from shardwright.estimate.views import AxisView, BlockView, axis_views, block_view
from shardwright.estimate.workload import Workload


@dataclass(frozen=True)
class Estimate:
    """What a step of one layout takes on one rank: the first, which has the most where parts are uneven.

    Attributes:
        subject: the model, the layout with all degrees filled in, and what is decided about it.
        moments: of a step, with their bytes.
        overheads: what the device holds beside tensors.
        traced: a forward and backward of a micro-batch.
        speed: how long a step takes.
        tokens_asked: of a run, to say how long it takes.
        price: dollars of one GPU for an hour; None: what the device's file says.
    """

    subject: Subject = field(repr=False)
    workload: Workload
    machine: Machine
    traced: Traced = field(repr=False)
    moments: tuple[Moment, ...]
    overheads: Overheads
    speed: Speed
    tokens_asked: float | None = None
    price: float | None = None

    @property
    def model(self) -> str:
        """The model's class name."""
        return type(self.subject.reading.model).__name__

    @property
    def config(self) -> ParallelConfig:
        """The layout, all degrees filled in."""
        return self.subject.config

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        return sum(layout.numel for layout in self.subject.layouts)

    @property
    def why_formula(self) -> str:
        """Why the activations come from a formula rather than from a trace; empty where they do not."""
        return self.traced.why_not

    @cached_property
    def axes(self) -> tuple[AxisView, ...]:
        """What is sent over each axis of the mesh."""
        return axis_views(self.subject, self.workload, self.machine, self.traced.parts)

    @cached_property
    def block(self) -> BlockView | None:
        """One block, with its styles and collectives; None where the model has none."""
        return block_view(self.subject, self.traced.parts)

    @property
    def days(self) -> float | None:
        """Of a run of :attr:`tokens_asked`; None where nobody asked."""
        if self.tokens_asked is None:
            return None
        return self.tokens_asked / (self.speed.tokens_per_second * self.config.least_world_size) / 86400

    @property
    def dollars(self) -> float | None:
        """Of that run; None where nobody asked, or nobody named a price."""
        price = self.machine.device.dollars_per_hour if self.price is None else self.price
        if self.days is None or price is None:
            return None
        return self.days * 24 * price * self.config.least_world_size

    @property
    def peak(self) -> Moment:
        """The moment with the most bytes."""
        return peak(self.moments)

    @property
    def reserved(self) -> int:
        """Bytes that torch's allocator takes where the device has room (``torch.cuda.max_memory_reserved``).

        It gives those back that it does not use before it fails, so that a layout can fit which would reserve more.
        """
        return reserved(self.moments) + self.overheads.fragmentation

    @property
    def memory(self) -> int:
        """Bytes that are needed on the device, overheads included."""
        return self.peak.total + self.overheads.total

    @property
    def free(self) -> int:
        """Bytes of the device that are left; below zero where the layout does not fit."""
        return self.machine.device.memory - self.memory

    @property
    def fits(self) -> bool:
        return self.free >= 0

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, for JSON."""
        at = self.peak
        return {
            "model": self.model,
            "parameters": self.parameters,
            "sharding": self.config.to_dict(),
            "workload": self.workload.to_dict(),
            "gpu": self.machine.key,
            "ranks": self.config.least_world_size,
            "fits": self.fits,
            "memory": {
                "device": self.machine.device.memory,
                "needed": self.memory,
                "free": self.free,
                "tensors": at.total,
                "reserved": self.reserved,
                "peak": {"phase": at.phase, "where": at.where or "outside of the blocks", "parts": dict(at.parts)},
                "context": self.overheads.context,
                "communicators": self.overheads.communicators,
                "fragmentation": self.overheads.fragmentation,
            },
            "speed": self.speed.to_dict(),
            "collectives": [axis.to_dict() for axis in self.axes],
            "days": self.days,
            "dollars": self.dollars,
            "activations_from": self.why_formula or "trace",
        }


def read_model(model: Model, weights: str, lora: int = 0) -> ModelReading:
    """The model on meta, read for estimates.

    Args:
        weights: dtype that the parameters are kept in; a model's own counts where ``model`` is one.
        lora: rank of adapters on all linear layers, everything else frozen; 0: all of the model is trained.

    Raises:
        ConfigError: there is no such model; adapters without peft.
    """
    if weights not in DTYPES:
        raise ConfigError(f"weights is {weights!r}; it must be one of {', '.join(DTYPES)}.")
    built = model if isinstance(model, nn.Module) else build_on_meta(load_config(model), dtype=getattr(torch, weights))
    return ModelReading(_with_adapters(built, lora) if lora else built)


def _with_adapters(model: nn.Module, rank: int) -> nn.Module:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ConfigError("LoRA adapters need peft: pip install 'shardwright[peft]'.") from error
    adapters: Any = LoraConfig(r=rank, target_modules="all-linear")
    with torch.device("meta"):
        made: nn.Module = get_peft_model(model, adapters, autocast_adapter_dtype=False)
    return made


def estimate(
    reading: ModelReading,
    config: ParallelConfig,
    workload: Workload,
    machine: Machine,
    *,
    gpus: int,
    tracer: Tracer | None = None,
) -> Estimate:
    """What a step takes. Nothing is run on a device and no weight is allocated.

    Args:
        config: ``dp_shard=-1`` takes the ranks that are left.
        gpus: how many ranks.
        tracer: to share traces between estimates of one model.

    Raises:
        ConfigError, PlanError: what :func:`shardwright.parallelize` would refuse, with the same message.
        UnsupportedError: Megatron-FSDP, or what :func:`shardwright.parallelize` does not combine.
    """
    if config.engine != "fsdp2":
        raise UnsupportedError(
            f"The peak of a step under {config.engine} is not known here; shardwright plan shows what it keeps between "
            "steps. Estimate with engine=fsdp2, which keeps as much or less."
        )
    subject = Subject.of(reading, config, gpus)
    traced = (tracer or Tracer()).trace(subject, workload)
    return assembled(subject, workload, machine, traced)


def assembled(subject: Subject, workload: Workload, machine: Machine, traced: Traced) -> Estimate:
    """The estimate of a model that is decided about, and traced."""
    found = step_moments(subject, workload, traced.parts)
    return Estimate(
        subject=subject,
        workload=workload,
        machine=machine,
        traced=traced,
        moments=tuple(found),
        overheads=overheads(subject.config, peak(found).total),
        speed=speed(subject, workload, machine, traced.parts),
    )


def largest_parts(parts: Mapping[str, int]) -> list[tuple[str, int]]:
    """The parts of a moment, the largest first, without those that are empty."""
    return [(name, size) for name, size in Counter(parts).most_common() if size]
