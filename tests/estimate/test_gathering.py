"""Predicted gathers and reductions of FSDP2 are those of real runs: every call and every byte."""

from __future__ import annotations

from typing import Any

import pytest
from click.testing import CliRunner
from estimate_models import config_of, real_gathers

from shardwright import ParallelConfig
from shardwright.cli import main
from shardwright.estimate import predict
from shardwright.verify.ranks import RankPool

FSDP = ParallelConfig(dp_shard=2)
BLOCK = 4 * (32 * 32 * 2 + 32 * 16 * 2 + 32 * 48 * 3 + 2 * 32) / 2**30  # of the tiny Llama, in GiB


def check(pool: RankPool, cases: list[tuple[str, ParallelConfig]]) -> None:
    for (family, config), (calls, size) in zip(cases, pool.run(real_gathers, cases)[0], strict=True):
        found = predict(config_of(family, 4), config).gathering
        assert found is not None
        predicted = {name: getattr(found, name) for name in ("forward_gathers", "backward_gathers", "reduces")}
        assert {name: count for name, count in predicted.items() if count} == calls, f"{family} {config}"
        assert found.sent == size * (config.dp_shard - 1) / config.dp_shard, f"{family} {config}"


def test_equals_real_runs(ranks2: RankPool) -> None:
    settings: list[dict[str, Any]] = [
        {}, {"reshard_after_forward": "always"}, {"reshard_after_forward": "never"},
        {"keep_gathered_gib": 2.5 * BLOCK}, {"precision": "bf16"}, {"shard_ends": True},
        {"shard_ends": True, "reshard_after_forward": "always"}, {"shard_ends": True, "reshard_after_forward": "never"},
    ]  # fmt: skip
    check(ranks2, [("llama", FSDP.with_(**options)) for options in settings] + [("qwen3 tied", FSDP)])


def test_equals_real_runs_beside_tensor_parallelism(ranks4: RankPool) -> None:
    config = ParallelConfig(tp=2, dp_shard=2, sequence_parallel=True)
    cases = [(family, config) for family in ("llama", "phi3", "mixtral")]
    check(ranks4, [*cases, ("llama", config.with_(shard_ends=True))])


@pytest.mark.parametrize(("budget", "kept"), [(0.0, 1), (1.9, 1), (2.0, 2), (3.9, 3), (4.0, 4)])
def test_as_many_blocks_stay_as_fit(budget: float, kept: int) -> None:
    found = predict(config_of("llama", 4), FSDP.with_(keep_gathered_gib=budget * BLOCK)).gathering
    assert found is not None
    outside = 4 * (2 * 96 * 32 + 32)
    assert (found.kept, found.kept_bytes) == (kept, round(kept * BLOCK * 2**30) + outside)


def test_without_fsdp2_nothing_is_gathered() -> None:
    assert predict(config_of("llama"), ParallelConfig(tp=2)).gathering is None


def test_the_report_says_it() -> None:
    arguments = ["plan", "llama", "--tp", "2", "--dp-shard", "4", "--keep-gathered-gib", "2"]
    text = CliRunner().invoke(main, arguments).output
    assert "33 units, 33 + 22 all-gathers, 33 reduce-scatters" in text
    assert "10 blocks and what lies outside of the blocks stay gathered" in text
