"""Predicted collectives are those of real runs: every call, forward and backward, and every byte."""

from __future__ import annotations

from functools import partial
from math import prod

import pytest
from estimate_models import (
    FAMILIES,
    OTHER_FAMILIES,
    STYLE_PLANS,
    TOKENS,
    Counts,
    config_of,
    real_traffic,
    source_of,
    unsharded,
)

from shardwright import ParallelConfig
from shardwright.distributed.styles import STYLES
from shardwright.estimate import predict
from shardwright.estimate.traffic import Collective
from shardwright.verify import verify
from shardwright.verify.ranks import RankPool

TP = ParallelConfig(tp=2, dp_shard=1)


def predicted(family: str, layers: int, config: ParallelConfig) -> Counts:
    found: Counts = {}
    for part in predict(source_of(family, layers), config).traffic:
        for call in part.collectives:
            calls, size = found.get((call.kind, call.backward), (0, 0))
            size += part.blocks * (prod(TOKENS) * call.token_bytes + call.fixed_bytes)
            found[call.kind, call.backward] = calls + part.blocks, size
    return found


@pytest.mark.parametrize("family", [*FAMILIES, *OTHER_FAMILIES])
def test_equals_real_runs(family: str, ranks2: RankPool) -> None:
    cases = [(family, 2, TP.with_(sequence_parallel=sp)) for sp in (False, True)]
    for case, real in zip(cases, ranks2.run(real_traffic, cases)[0], strict=True):
        assert predicted(*case) == real


def test_equals_real_runs_under_fsdp(ranks4: RankPool) -> None:
    cases = [("qwen3 tied", 2, ParallelConfig(tp=2, dp_shard=2, sequence_parallel=sp)) for sp in (False, True)]
    for case, real in zip(cases, ranks4.run(real_traffic, cases)[0], strict=True):
        assert predicted(*case) == real


@pytest.mark.parametrize("mode", ["full", "every_2"])
def test_a_recomputed_block_sums_gradients_for_itself(mode: str, ranks2: RankPool) -> None:
    """Under sequence parallelism nothing else is an all-reduce in backward, recomputed or not."""
    case = ("llama", 4, TP.with_(sequence_parallel=True, activation_checkpointing=mode))
    sums = ("all_reduce", True)
    assert predicted(*case)[sums] == ranks2.run(real_traffic, [case])[0][0][sums]


def test_blocks_are_units_of_either_engine() -> None:
    config = ParallelConfig(tp=2, dp_shard=2, sequence_parallel=True)
    first, second = (predict(config_of("llama"), config.with_(engine=name)) for name in ("fsdp2", "megatron_fsdp"))
    assert first.traffic == second.traffic
    assert (first.gathering is None, second.gathering is None) == (False, True)


@pytest.mark.parametrize("plan", STYLE_PLANS)
def test_a_plan_is_exact_and_sends_what_is_predicted(plan: str, ranks2: RankPool) -> None:
    family = STYLE_PLANS[plan]
    for sequence_parallel in (False, True):
        config = TP.with_(plan=plan, sequence_parallel=sequence_parallel)
        report = verify(partial(unsharded, family, 2), config, pool=ranks2)
        assert report.exact, report
        assert predicted(family, 2, config) == ranks2.run(real_traffic, [(family, 2, config)])[0][0]


def test_every_style_is_compared_with_a_real_run() -> None:
    cases = [("llama", TP.with_(sequence_parallel=True)), *((family, TP) for family in (*FAMILIES, *OTHER_FAMILIES))]
    cases += [(family, TP.with_(plan=plan)) for plan, family in STYLE_PLANS.items()]
    used = {row.style.partition(":")[0] for case in cases for row in predict(source_of(case[0]), case[1]).rows}
    # What experts on ranks of their own exchange is compared in tests/distributed/test_expert_parallel.py.
    missing = set(STYLES) - {"expert_parallel"} - used
    assert not missing, f"{missing}: put a plan with it into STYLE_PLANS of estimate_models.py"


ACTIVATIONS = {
    False: {("all_reduce", False): 2, ("all_reduce", True): 2},
    True: {
        ("all_gather", False): 2,
        ("reduce_scatter", False): 2,
        ("all_gather", True): 2,
        ("reduce_scatter", True): 2,
    },
}


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tp", "tp+sp"])
def test_dense_layer_contract(sequence_parallel: bool, ranks2: RankPool) -> None:
    """A dense decoder layer: 4 all-reduces; under sequence parallelism 4 gathers and 4 reduce-scatters instead.

    In one data-parallel rank's float32 no layer adds a sum of small gradients of its own.
    """
    config = TP.with_(sequence_parallel=sequence_parallel)
    short, long = ranks2.run(real_traffic, [("llama", layers, config) for layers in (2, 4)])[0]
    slope = {key: (long[key][0] - short.get(key, (0, 0))[0]) / 2 for key in long}
    assert {key: calls for key, calls in slope.items() if calls} == ACTIVATIONS[sequence_parallel]


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tp", "tp+sp"])
def test_dense_layer_contract_under_fsdp(sequence_parallel: bool, ranks4: RankPool) -> None:
    """The same where blocks are FSDP2 units, each of which sums the gradients of its whole parameters together."""
    config = ParallelConfig(tp=2, dp_shard=2, sequence_parallel=sequence_parallel)
    short, long = ranks4.run(real_traffic, [("llama", layers, config) for layers in (2, 4)])[0]
    slope = {key: (long[key][0] - short.get(key, (0, 0))[0]) / 2 for key in long}
    expected = dict(ACTIVATIONS[sequence_parallel])
    if sequence_parallel:
        expected["all_reduce", True] = 1  # the layer's two norms
    assert {key: calls for key, calls in slope.items() if calls} == expected


def test_one_rank_sends_nothing() -> None:
    assert predict(config_of("llama"), ParallelConfig(tp=1)).traffic == ()


def test_sent_bytes_of_a_ring() -> None:
    assert Collective("all_reduce", False, 100).sent(100, 4) == 150
    assert Collective("all_gather", False, 100).sent(100, 4) == 75


def test_sequence_parallelism_sends_as_much_in_the_blocks() -> None:
    """An all-reduce is a reduce-scatter and an all-gather."""
    plain, split = (predict(config_of("llama"), TP.with_(sequence_parallel=sp)) for sp in (False, True))
    assert plain.traffic[0].sent_per_token(2) == split.traffic[0].sent_per_token(2) == 4 * 32 * 4


def test_precision_halves_what_activations_send() -> None:
    full, half = (predict(config_of("llama"), TP.with_(precision=name)) for name in ("float32", "bf16"))
    assert half.traffic[0].sent_per_token(2) * 2 == full.traffic[0].sent_per_token(2)
