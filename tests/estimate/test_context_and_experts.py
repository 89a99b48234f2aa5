"""Estimates under ``cp`` and ``ep``: collectives and memory are those of real ranks."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from functools import cache
from typing import Any

import pytest
import torch
from estimate_models import config_of, sharded
from expert_mixtures import ByMask, model_with
from step_peak import real_peaks
from torch.utils._python_dispatch import TorchDispatchMode

from shardwright import ParallelConfig, parallelize
from shardwright.distributed.models.build import build_on_meta
from shardwright.distributed.replay.reading import ModelReading
from shardwright.estimate.estimating import Estimate, estimate
from shardwright.estimate.hardware import load_machine
from shardwright.estimate.search import search
from shardwright.estimate.subject import Subject
from shardwright.estimate.trace import run
from shardwright.estimate.trace.tracer import Tracer
from shardwright.estimate.workload import Workload
from shardwright.verify.ranks import RankPool, shared_mesh

ROWS, LENGTH, LAYERS = 2, 64, 3
WORK = Workload(LENGTH, ROWS, optimizer="adamw_loop")
CP, EP = ParallelConfig(cp=2, dp_shard=1), ParallelConfig(ep=2, dp_shard=2)
CASES = (
    ("llama", CP),
    ("llama", CP.with_(activation_checkpointing="full")),
    ("llama", CP.with_(context_method="ulysses")),
    ("gemma3", CP),
    ("mixtral", EP),
    ("mixtral", ParallelConfig(ep=2, tp=2, dp_shard=1)),
)
LAST, LISTED = len(CASES) - 1, "experts in lists"
KINDS = {"all_reduce": 1, "all_gather_into_tensor": 2, "reduce_scatter_tensor": 1, "all_to_all_single": 1}
Calls = dict[tuple[str, bool], tuple[int, int]]


@cache
def read(family: str) -> tuple[ModelReading, Tracer]:
    """A model that several tests ask about is read and traced once."""
    return ModelReading(build_on_meta(config_of(family, LAYERS), dtype=torch.float32)), Tracer()


def estimated(family: str, config: ParallelConfig, gpus: int = 2, tracer: Tracer | None = None) -> Estimate:
    reading, shared = read(family)
    found = estimate(reading, config, WORK, load_machine("h100-80gb"), gpus=gpus, tracer=tracer or shared)
    assert not found.why_formula
    return found


class Sent(TorchDispatchMode):
    """Counts the collectives that are no FSDP2's, and the bytes of whole tensors, on two ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.backward = False
        self.calls: Counter[tuple[str, bool]] = Counter()
        self.bytes: Counter[tuple[str, bool]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.partition(".")[0]
        if func.namespace == "_c10d_functional" and name in KINDS:
            key = name, self.backward
            self.calls[key] += 1
            self.bytes[key] += KINDS[name] * args[0].numel() * args[0].element_size()
        return func(*args, **(kwargs or {}))


def listed() -> torch.nn.Module:
    """A model with its experts in lists."""
    return model_with(*[ByMask] * LAYERS)


def real_calls(cases: list[tuple[str, ParallelConfig]]) -> list[Calls]:
    found = []
    for family, config in cases:
        in_lists = family == LISTED
        model = parallelize(listed(), config, shared_mesh(config)) if in_lists else sharded(family, LAYERS, config)
        model.train()
        ids = (torch.arange(ROWS * LENGTH) % 60).view(ROWS, LENGTH)
        model(input_ids=ids, labels=ids).loss.backward()  # the first call compares the ranks' inputs, too
        with Sent() as sent:
            loss = model(input_ids=ids, labels=ids).loss
            sent.backward = True
            loss.backward()
        found.append({key: (sent.calls[key], sent.bytes[key]) for key in sent.calls})
    return found


NAMES = {"all_gather_into_tensor": "all_gather", "reduce_scatter_tensor": "reduce_scatter",
         "all_to_all_single": "all_to_all", "all_reduce": "all_reduce"}  # fmt: skip


def test_collectives_are_those_of_real_ranks(ranks2: RankPool) -> None:
    real = ranks2.run(real_calls, [*CASES, (LISTED, EP)])
    for place, (family, config) in enumerate([*CASES, (LISTED, EP)]):
        calls: Counter[tuple[str, bool]] = Counter()
        sizes: Counter[tuple[str, bool]] = Counter()
        for part in traced(family, config):
            for sending, count in part.segment.sent.items():
                calls[sending.kind, part.segment.backward] += count
                sizes[sending.kind, part.segment.backward] += sending.bytes * count
        ranks = [{(NAMES[kind], backward): both for (kind, backward), both in rank[place].items()} for rank in real]
        assert {key: number for key, (number, _) in ranks[0].items()} == dict(calls), (family, config)
        told: Counter[str] = Counter()
        for axis in estimated(family, config).axes if place in (0, LAST) else ():
            told.update(axis.calls if axis.axis in ("tp", "cp", "ep") else {})
        kinds = {kind: calls[kind, False] + calls[kind, True] for kind, _ in calls}
        assert dict(told) in ({}, kinds), "what a reader is told is what was traced"
        for key, size in sizes.items():
            # How many rows an expert gets depends on the router; together the ranks send what a balanced one does.
            assert sum(rank[key][1] for rank in ranks) == 2 * size, (family, config, key)


def traced(family: str, config: ParallelConfig) -> Any:
    reading, tracer = (ModelReading(listed()), Tracer()) if family == LISTED else read(family)
    return tracer.trace(Subject.of(reading, config, 2), WORK).parts


def test_the_peak_is_that_of_real_ranks_under_cp_and_ep(ranks2: RankPool, monkeypatch: pytest.MonkeyPatch) -> None:
    # On a CPU the mask of the last queries is written out, and kept; on a GPU it is not, and a trace leaves it out.
    monkeypatch.setattr(run, "_Causal", nullcontext)
    cases = [CASES[0], CASES[1], CASES[4]]
    real = ranks2.run(real_peaks, [(family, LAYERS, config) for family, config in cases], (ROWS, LENGTH))
    errors = []
    for place, (family, config) in enumerate(cases):
        most = max(rank[place] for rank in real)
        errors.append(estimated(family, config, tracer=Tracer()).peak.total / most - 1)
    print("errors of the peak under cp and ep:", ", ".join(f"{error:+.1%}" for error in errors))
    assert max(map(abs, errors)) < 0.05


def test_a_window_sends_the_positions_before_a_part() -> None:
    """A trace has masks without values: what the attention function is told stands for them."""
    model = build_on_meta(config_of("mistral", LAYERS), dtype=torch.float32)
    window, kept = model.config.sliding_window, 2  # blocks of a kind that are traced
    parts = Tracer().trace(Subject.of(ModelReading(model), CP, 2), WORK).parts
    sent: Counter[int] = Counter()
    for part in parts:
        sent.update({each.bytes: n for each, n in part.segment.sent.items() if each.kind == "all_to_all"})
    heads = model.config.num_key_value_heads * model.config.head_dim
    # Over two ranks half of an even exchange is sent, and of this one all.
    assert sent == {2 * (window - 1) * ROWS * 2 * heads * 4: 2 * kept}


def test_a_sequence_in_parts_takes_less_and_sends_more() -> None:
    whole, split = estimated("llama", CP.with_(cp=1, dp_shard=1), 1), estimated("llama", CP)
    activations = [max(moment.parts["activations"] for moment in found.moments) for found in (whole, split)]
    assert 0.45 < activations[1] / activations[0] < 0.65, "keys and values are whole"
    assert split.speed.collectives["cp"] > 0 == split.speed.collectives["tp"]
    assert split.moments[-1].parts["optimizer"] == pytest.approx(whole.moments[-1].parts["optimizer"] / 2, rel=0.01)


def test_experts_on_ranks_of_their_own_are_not_gathered() -> None:
    together, apart = estimated("mixtral", EP.with_(ep=1)), estimated("mixtral", EP)
    gathered = [max(moment.parts["gathered"] for moment in found.moments) for found in (together, apart)]
    assert gathered[1] < gathered[0]
    assert apart.speed.collectives["ep"] > 0 == together.speed.collectives["ep"]


def test_experts_in_lists_of_their_own() -> None:
    """They compute the tokens that come to them, and have no more of the weights than FSDP2 alone gathers."""
    reading = ModelReading(listed())
    made = {ep: estimate(reading, EP.with_(ep=ep), WORK, load_machine("h100-80gb"), gpus=2) for ep in (1, 2)}
    flops = {
        ep: sum(
            kernel.flops * count
            for part in found.traced.parts
            if not part.segment.backward
            for kernel, count in part.segment.kernels.items()
        )
        for ep, found in made.items()
    }
    assert flops[1] == flops[2] > 0, "a rank computes as many rows, of fewer experts"
    assert made[2].speed.collectives["ep"] > 0 == made[1].speed.collectives["ep"]
    assert "one after another" in made[2].why_formula
    best = search(
        reading, WORK, load_machine("h100-80gb"), gpus=2, global_batch=4, objective="speed", base=ParallelConfig()
    )
    assert {found.config.ep for found in best.fitting} == {1, 2}
