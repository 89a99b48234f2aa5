"""How long a step takes: what must hold for any machine, and what is computed by hand."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from estimate_models import config_of

from shardwright import ParallelConfig
from shardwright.distributed.models.build import build_on_meta
from shardwright.distributed.replay.reading import ModelReading
from shardwright.estimate.estimating import Estimate, estimate
from shardwright.estimate.hardware import known_devices, load_fabric, load_machine
from shardwright.estimate.kernel_time import Links, kernel_seconds
from shardwright.estimate.subject import Subject
from shardwright.estimate.trace.kernels import Kernel
from shardwright.estimate.trace.tracer import Tracer
from shardwright.estimate.workload import Workload

WORK = Workload(64, 2)
H100 = load_machine("h100-80gb")
READING = ModelReading(build_on_meta(config_of("llama", 4), dtype=torch.float32))
TRACER = Tracer()


def of(config: ParallelConfig, work: Workload = WORK, gpus: int = 2) -> Estimate:
    return estimate(READING, config, work, H100, gpus=gpus, tracer=TRACER)


@pytest.mark.parametrize("device", known_devices())
def test_every_file_of_a_device_is_whole(device: str) -> None:
    machine = load_machine(device)
    assert machine.device.peak("bfloat16") > 0 < machine.device.memory
    assert machine.device.source
    assert 0 < machine.inside.efficiency <= 1


def test_parts_of_a_step_add_up() -> None:
    found = of(ParallelConfig(precision="bf16")).speed
    assert found.step == pytest.approx(
        found.compute + sum(found.collectives.values()) + found.exposed + found.optimizer
    )
    spans = [span for span in found.timeline.spans if span.queue != "FSDP2"]
    assert all(a.end <= b.start + 1e-12 for a, b in pairwise(spans))


def test_a_roofline() -> None:
    large = Kernel("matmul", 2 * 8192**3, 3 * 8192**2 * 2, (1, 8192, 8192, 8192), "bfloat16")
    thin = Kernel("matmul", 2 * 8192**2, 8192**2 * 2, (1, 1, 8192, 8192), "bfloat16")
    reached, device = H100.efficiencies, H100.device
    assert kernel_seconds(large, H100) == pytest.approx(2 * 8192**3 / (989.4e12 * reached.matmul))
    assert kernel_seconds(thin, H100) == pytest.approx(thin.bytes / (device.memory_gb_per_s * 1e9 * reached.memory))


def test_copies_beside_collectives_stay_when_the_rest_is_fused() -> None:
    copy, other = (Kernel(kind, 0, 2**30) for kind in ("copy", "memory"))
    assert (
        kernel_seconds(copy, H100, fused=True) == kernel_seconds(other, H100) > kernel_seconds(other, H100, fused=True)
    )
    found = TRACER.trace(Subject.of(READING, ParallelConfig(tp=2, dp_shard=1, sequence_parallel=True), 2), WORK).parts
    forward = next(part.segment for part in found if part.where.endswith(".1") and not part.segment.backward)
    copies = sum(count for kernel, count in forward.kernels.items() if kernel.kind == "copy")
    assert copies == forward.sent.total() == 4, "one behind each gather, one before each reduction"


def test_without_a_switch_two_of_four_devices_have_a_third_of_the_links() -> None:
    meshed = replace(H100, inside=load_fabric("nvlink4-mesh"))
    two, four = (Links(meshed, ParallelConfig(tp=tp, dp_shard=1)).bytes_per_second("tp") for tp in (2, 4))
    assert two == pytest.approx(four / 3)


def test_collectives_take_the_fabric_that_the_axis_is_on() -> None:
    inside = Links(H100, ParallelConfig(tp=8, dp_shard=16))
    assert (inside.inside("tp"), inside.inside("dp_shard")) == (True, False)
    assert inside.bytes_per_second("tp") > 5 * inside.bytes_per_second("dp_shard")
    whole = Links(H100, ParallelConfig(tp=1, dp_shard=128))  # all ports of a node work for one ring
    assert whole.bytes_per_second("dp_shard") == pytest.approx(8 * inside.bytes_per_second("dp_shard"), rel=0.1)
    size = 10**9
    assert inside.seconds("tp", "all_reduce", size) == pytest.approx(2 * inside.seconds("tp", "all_gather", size))
    assert Links(H100, ParallelConfig(dp_shard=1)).seconds("tp", "all_gather", size) == 0


def test_recomputation_and_accumulation_cost_time() -> None:
    plain = of(ParallelConfig())
    full = of(ParallelConfig(activation_checkpointing="full"))
    often = of(ParallelConfig(), replace(WORK, accumulation=4))
    assert full.speed.compute > 1.15 * plain.speed.compute
    assert full.speed.mfu < plain.speed.mfu
    assert often.speed.compute == pytest.approx(4 * plain.speed.compute)
    assert often.speed.optimizer == plain.speed.optimizer


def test_days_and_dollars() -> None:
    found = replace(of(ParallelConfig()), tokens_asked=1e9, price=2.0)
    assert found.days == pytest.approx(1e9 / (2 * found.speed.tokens_per_second) / 86400)
    assert found.dollars == pytest.approx(found.days * 24 * 2 * 2.0)
    assert of(ParallelConfig()).days is None
