"""How long a step takes, what it waits for, and what that means in tokens, MFU, days and dollars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shardwright.estimate.hardware import Machine
from shardwright.estimate.subject import Subject
from shardwright.estimate.timeline import AXES, COMPUTE, Timeline, timeline
from shardwright.estimate.trace.whole import Part
from shardwright.estimate.workload import Workload

# Passes over the parameters: how often an optimizer reads or writes all of them, its state and gradients.
_PASSES = {"adamw": 18, "adamw_fused": 7, "adamw_loop": 18, "adamw_8bit": 5, "adafactor": 8, "sgd": 3,
           "sgd_momentum": 5, "muon": 10}  # fmt: skip
_CLIPPING = 3  # a norm reads all gradients; scaling them reads and writes


@dataclass(frozen=True)
class Speed:
    """Seconds of one step, and what they are spent on.

    Attributes:
        step: seconds of a step.
        compute: of all micro-batches.
        collectives: seconds of those that computation waits for, by axis: ``tp``, ``cp``, ``ep``.
        exposed: waiting for gathers and reductions of FSDP2.
        hidden: gathers and reductions beside computation.
        optimizer: clipping and the optimizer.
        tokens_per_second: of one GPU.
        mfu: model FLOPs utilization, between 0 and 1: causality is not deducted, recomputation not credited
            (Chowdhery et al. 2022).
        timeline: of the last micro-batch.
    """

    step: float
    compute: float
    collectives: Mapping[str, float]
    exposed: float
    hidden: float
    optimizer: float
    tokens_per_second: float
    mfu: float
    timeline: Timeline

    @property
    def waits_for(self) -> tuple[str, float]:
        """The largest part of a step in which nothing is computed, and its share of the step."""
        parts = {f"collectives of {AXES[axis]}": seconds for axis, seconds in self.collectives.items()}
        parts |= {"gathers and reductions of FSDP2": self.exposed, "the optimizer": self.optimizer}
        name = max(parts, key=lambda key: parts[key])
        return name, parts[name] / self.step

    def to_dict(self) -> dict[str, Any]:
        return {
            "step_seconds": self.step,
            "compute_seconds": self.compute,
            "tensor_parallel_seconds": self.collectives["tp"],
            "context_parallel_seconds": self.collectives["cp"],
            "expert_parallel_seconds": self.collectives["ep"],
            "fsdp2_exposed_seconds": self.exposed,
            "fsdp2_hidden_seconds": self.hidden,
            "optimizer_seconds": self.optimizer,
            "tokens_per_second_per_gpu": self.tokens_per_second,
            "mfu": self.mfu,
            "waits_for": self.waits_for[0],
        }


def speed(subject: Subject, workload: Workload, machine: Machine, parts: Sequence[Part]) -> Speed:
    """The time of a step on every rank alike."""
    last = timeline(subject, workload, machine, parts)
    others = workload.accumulation - 1
    first = timeline(subject, workload, machine, parts, reduces=False) if workload.reduce_last_only else last
    lines = [(last, 1), (first, others)]
    optimizer = _optimizer_seconds(subject, workload, machine)
    step = sum(line.end * count for line, count in lines) + optimizer
    tokens = workload.tokens * workload.accumulation * subject.data_parallel / subject.ranks
    compute = sum(line.busy(COMPUTE) * count for line, count in lines)
    collectives = {axis: sum(line.busy(queue) * count for line, count in lines) for axis, queue in AXES.items()}
    exposed = sum(line.waiting * count for line, count in lines)
    sent = sum(line.busy("FSDP2") * count for line, count in lines)
    dtype = str(subject.compute).removeprefix("torch.")
    return Speed(
        step=step,
        compute=compute,
        collectives=collectives,
        exposed=exposed,
        hidden=max(sent - exposed, 0.0),
        optimizer=optimizer,
        tokens_per_second=tokens / step,
        mfu=model_flops(parts) * workload.accumulation / step / machine.device.peak(dtype),
        timeline=last,
    )


def model_flops(parts: Sequence[Part]) -> float:
    """Floating-point operations of a forward and backward on a rank, three times those of the forward's products."""
    forward = [part.segment for part in parts if not part.segment.backward]
    return 3.0 * sum(
        kernel.flops * (2 if kernel.kind == "attention" and kernel.causal else 1) * count
        for segment in forward
        for kernel, count in segment.kernels.items()
        if kernel.kind in ("matmul", "attention")
    )


def _optimizer_seconds(subject: Subject, workload: Workload, machine: Machine) -> float:
    trained = sum(
        layout.gathered_numel * layout.dtype.itemsize / layout.data_parallel(subject.config.parameter_ranks)
        for layout in subject.layouts
        if layout.trained
    )
    passes = _PASSES[workload.optimizer] + _CLIPPING
    return passes * trained / (machine.device.memory_gb_per_s * 1e9 * machine.efficiencies.memory)
