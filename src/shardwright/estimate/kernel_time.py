"""Seconds that kernels and collectives take on a machine: a roofline with efficiencies, latency and bandwidth."""

from __future__ import annotations

from collections.abc import Iterable

from shardwright.distributed.axes import EXPERT_SHARDS
from shardwright.distributed.config import ParallelConfig
from shardwright.estimate.hardware import Machine
from shardwright.estimate.trace.kernels import Kernel, Sending
from shardwright.estimate.trace.live import Segment


def kernel_seconds(kernel: Kernel, machine: Machine, *, fused: bool = False) -> float:
    """One kernel: bound by its operations, or by its bytes.

    Args:
        fused: it is in a compiled block, which reads and writes a share of the bytes.
    """
    reached = machine.efficiencies
    moving = kernel.bytes / (machine.device.memory_gb_per_s * 1e9 * reached.memory)
    if kernel.kind in ("memory", "copy"):
        return moving * (reached.fused if fused and kernel.kind == "memory" else 1.0)
    if kernel.kind == "matmul":
        share = reached.of_product(kernel.flops)
    else:
        share = reached.attention if kernel.kind == "attention" else reached.attention_backward
    return max(kernel.flops / (machine.device.peak(kernel.dtype) * share), moving)


def segment_seconds(segment: Segment, machine: Machine, *, fused: bool = False) -> float:
    """What a segment computes. Eager code cannot be faster than the host launches its kernels."""
    busy = sum(kernel_seconds(kernel, machine, fused=fused) * count for kernel, count in segment.kernels.items())
    launching = 0.0 if fused else segment.kernels.total() * machine.efficiencies.launch_us * 1e-6
    return max(busy, launching)


class Links:
    """Which fabric the ranks along an axis talk over: neighbours share a node, ``tp`` and ``ep`` are innermost."""

    def __init__(self, machine: Machine, config: ParallelConfig) -> None:
        self.machine = machine
        model = config.parameter_ranks * config.tp
        self.sizes = {
            "tp": config.tp, "cp": config.cp, "dp_shard": config.parameter_ranks, "dp_replicate": config.dp_replicate,
            "ep": config.ep, EXPERT_SHARDS: model // config.ep,
        }  # fmt: skip
        self.strides = {
            "tp": 1, "cp": config.tp, "dp_shard": config.tp, "dp_replicate": model, "ep": 1, EXPERT_SHARDS: config.ep,
        }  # fmt: skip

    def inside(self, axis: str) -> bool:
        """Whether the ranks along ``axis`` are all in one node."""
        return self.sizes[axis] * self.strides[axis] <= self.machine.device.gpus_per_node

    def name(self, axis: str) -> str:
        return (self.machine.inside if self.inside(axis) else self.machine.between).name

    def bytes_per_second(self, axis: str) -> float:
        """Of one rank in a ring over the axis. Ranks of one node share all of its ports.

        Without a switch every pair of a node's devices has links of its own, and a group those among its members.
        """
        inside, between = self.machine.inside, self.machine.between
        own = inside.gb_per_s * inside.efficiency
        if inside.pairwise:
            own *= (min(self.sizes[axis], inside.pairwise) - 1) / (inside.pairwise - 1)
        if self.inside(axis):
            return own * 1e9
        in_node = max(self.machine.device.gpus_per_node // self.strides[axis], 1)
        ports = between.gb_per_s * between.efficiency * min(in_node, self.sizes[axis])
        return (min(own, ports) if in_node > 1 else ports) * 1e9

    def seconds(self, axis: str, kind: str, size: float) -> float:
        """A collective of ``size`` bytes in all, in a ring (Patarasuk, Yuan 2009); an all-reduce goes round twice.

        Of an exchange (all-to-all) ``size`` is what one rank has, of which its own part stays.
        """
        ranks = self.sizes[axis]
        if ranks == 1 or not size:
            return 0.0
        rounds = 2 if kind == "all_reduce" else 1
        latency = (self.machine.inside if self.inside(axis) else self.machine.between).latency_us * 1e-6
        return rounds * ((ranks - 1) * latency + size * (ranks - 1) / ranks / self.bytes_per_second(axis))

    def sending_seconds(self, axis: str, sent: Iterable[tuple[Sending, int]]) -> float:
        """The collectives of a segment over an axis that computation waits for."""
        return sum(self.seconds(axis, each.kind, each.bytes) * count for each, count in sent if each.axis == axis)
