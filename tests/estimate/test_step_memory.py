"""The predicted peak of a step is that of real ranks, whose tensors are counted storage by storage."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from estimate_models import config_of
from step_peak import real_peaks
from transformers import LlamaForCausalLM

from shardwright import ParallelConfig
from shardwright.distributed.models.build import build_on_meta
from shardwright.distributed.replay.reading import ModelReading
from shardwright.errors import ConfigError
from shardwright.estimate.peak import Moment, peak, reserved
from shardwright.estimate.step_memory import step_moments
from shardwright.estimate.subject import Subject
from shardwright.estimate.trace.tracer import Tracer
from shardwright.estimate.workload import Workload
from shardwright.verify.ranks import RankPool

ROWS, LENGTH, LAYERS = 2, 64, 5
WORK = Workload(LENGTH, ROWS, optimizer="adamw_loop")
FSDP, TP = ParallelConfig(dp_shard=2), ParallelConfig(tp=2, dp_shard=1)
LAYOUTS = (
    FSDP,
    FSDP.with_(precision="bf16"),
    FSDP.with_(activation_checkpointing="full"),
    FSDP.with_(activation_checkpointing="selective_2"),
    FSDP.with_(activation_checkpointing="selective", reshard_after_forward="never"),
    ParallelConfig(dp_shard=1, dp_replicate=2),
    TP,
    TP.with_(sequence_parallel=True),
    TP.with_(loss_tiles=4, activation_checkpointing="every_2"),
)
# Errors above this one would be mistakes of the model of memory; the largest one seen is below.
TOLERANCE = 0.05


@cache
def read(family: str, layers: int, dtype: torch.dtype = torch.float32) -> tuple[ModelReading, Tracer]:
    """A model that many tests ask about is read and traced once."""
    return ModelReading(build_on_meta(config_of(family, layers), dtype=dtype)), Tracer()


def moments_of(family: str, config: ParallelConfig, work: Workload = WORK, layers: int = LAYERS) -> list[Moment]:
    reading, tracer = read(family, layers)
    subject = Subject.of(reading, config, config.least_world_size)
    traced = tracer.trace(subject, work)
    assert not traced.why_not
    return step_moments(subject, work, traced.parts)


@pytest.mark.parametrize("family", ["llama", "mixtral", "gemma3"])
def test_the_peak_is_that_of_real_ranks(family: str, ranks2: RankPool) -> None:
    real = ranks2.run(real_peaks, [(family, LAYERS, config) for config in LAYOUTS], (ROWS, LENGTH))[0]
    predicted = [peak(moments_of(family, config)).total for config in LAYOUTS]
    errors = [found / counted - 1 for found, counted in zip(predicted, real, strict=True)]
    print(family, "errors of the peak:", ", ".join(f"{error:+.1%}" for error in errors))
    assert max(map(abs, errors)) < TOLERANCE


def test_depth_adds_what_a_block_keeps() -> None:
    """Nine blocks are composed from the two that are traced: each adds the same."""
    kept = [
        max(moment.parts["activations"] for moment in moments_of("llama", FSDP, layers=layers)) for layers in (3, 6, 9)
    ]
    assert kept[1] - kept[0] == kept[2] - kept[1] > 0


def test_what_recomputation_saves_is_seen() -> None:
    none, full = (peak(moments_of("llama", FSDP.with_(activation_checkpointing=mode))) for mode in ("none", "full"))
    assert full.parts["activations"] < none.parts["activations"] / 4


def test_fewer_products_take_less_memory() -> None:
    modes = ("full", "selective_3", "selective_2", "selective")
    found = [peak(moments_of("llama", FSDP.with_(activation_checkpointing=mode))).total for mode in modes]
    assert found == sorted(set(found))


def test_streams_do_not_share_what_they_freed() -> None:
    found = moments_of("llama", FSDP)
    shards = found[-1].parts["gradients"]
    assert reserved(found) >= peak(found).total + shards, "gradients are on a stream of their own, and gone at the peak"
    alone = moments_of("llama", ParallelConfig(dp_shard=1))
    assert reserved(alone) == peak(alone).total


def outside(config: ParallelConfig, **changes: Any) -> list[Moment]:
    """Of two micro-batches with a loss outside of the model, some decisions taken otherwise."""
    work = Workload(LENGTH, ROWS, accumulation=2, optimizer="adamw_loop", loss="logits")
    reading, tracer = read("llama", LAYERS, torch.bfloat16)
    subject = Subject.of(reading, config, config.least_world_size)
    subject = replace(subject, decided=replace(subject.decided, **changes))
    return step_moments(subject, work, tracer.trace(subject, work).parts)


def test_a_root_that_is_freed_after_forward_is_not_there_while_the_loss_is_computed() -> None:
    kept = Subject.of(read("llama", LAYERS, torch.bfloat16)[0], FSDP, 2).decided
    assert kept.data is not None
    units = tuple(replace(unit, reshard_after_forward=True) for unit in kept.data.units)
    least = []
    for found in (outside(FSDP), outside(FSDP, data=replace(kept.data, units=units))):
        most = max(moment.parts["activations"] for moment in found)
        least.append(min(moment.parts["gathered"] for moment in found if moment.parts["activations"] == most))
    assert least[1] == 0 < least[0]


def test_a_model_compiled_as_one_hands_back_all_gradients_together() -> None:
    one = ParallelConfig(dp_shard=1)
    eager, compiled = outside(one), outside(one, compiled=("",))
    total = eager[-1].parts["gradients"]
    assert max(moment.parts["unreduced"] for moment in eager) == 0
    assert 0.8 * total < max(moment.parts["unreduced"] for moment in compiled) <= total


def test_inputs_on_the_host_are_not_on_the_device() -> None:
    config = FSDP.with_(activation_checkpointing="full")
    here, away = (
        max(moment.parts["activations"] for moment in moments_of("llama", config.with_(offload_activations=offload)))
        for offload in (False, True)
    )
    stream = ROWS * LENGTH * 32 * 4
    assert here - away == LAYERS * stream


def test_accumulated_gradients_stay_from_the_start() -> None:
    once = moments_of("llama", FSDP)
    often = moments_of("llama", FSDP, Workload(LENGTH, ROWS, accumulation=4))
    whole = moments_of("llama", FSDP, Workload(LENGTH, ROWS, accumulation=4, reduce_last_only=True))
    assert once[0].parts["gradients"] == 0
    assert often[0].parts["gradients"] == once[-1].parts["gradients"]
    assert whole[0].parts["gradients"] >= 2 * often[0].parts["gradients"]
    assert whole[-1].parts["gradients"] == often[-1].parts["gradients"]


@pytest.mark.parametrize(
    ("name", "bytes_each"),
    [("adamw", 8), ("adamw_fused", 8), ("sgd", 0), ("sgd_momentum", 4), ("adamw_8bit", 2.03), ("adafactor", 0.4)],
)
def test_the_state_of_every_optimizer(name: str, bytes_each: float) -> None:
    step = moments_of("llama", FSDP, Workload(LENGTH, ROWS, optimizer=name))[-1]
    ratio = step.parts["optimizer"] / (step.parts["parameters"] / 4)
    assert ratio <= max(bytes_each, 8 if name == "adamw_8bit" else 0)  # small parameters keep 32 bits
    assert ratio == pytest.approx(bytes_each, abs=0.1) or name == "adamw_8bit"


def test_unknown_optimizers_are_told() -> None:
    with pytest.raises(ConfigError, match="optimizer is 'lion'; it must be one of adamw"):
        moments_of("llama", FSDP, Workload(LENGTH, optimizer="lion"))


class _NeedsValues(LlamaForCausalLM):
    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:  # type: ignore[override]
        if not input_ids.is_meta and int(input_ids.numpy().max()) < 0:
            raise ValueError("negative ids")
        return super().forward(input_ids=input_ids, **kwargs)


def test_code_that_needs_values_gets_a_formula() -> None:
    config = config_of("llama", LAYERS)
    with torch.device("meta"):
        looks, plain = _NeedsValues(config), LlamaForCausalLM(config)
    subjects = [Subject.of(ModelReading(model), FSDP, 2) for model in (looks, plain)]
    formula, traced = (Tracer().trace(subject, WORK) for subject in subjects)
    assert formula.why_not
    assert not traced.why_not
    peaks = [
        peak(step_moments(subject, WORK, found.parts)).total
        for subject, found in zip(subjects, (formula, traced), strict=True)
    ]
    assert 0.5 < peaks[0] / peaks[1] < 2
