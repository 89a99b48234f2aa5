"""The zoo: every outcome becomes an entry, and entries become a page. Then a spread of real architectures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict

import pytest
import transformers
from click.testing import CliRunner
from packaging.version import Version
from torch import nn

from shardwright import ParallelConfig
from shardwright.errors import PlanError
from shardwright.verify import RankPool, zoo
from shardwright.verify.page import write_page
from shardwright.verify.public import case_of
from shardwright.verify.zoo import MODES, Entry, all_types, examine, plan_of


def test_the_zoo_has_every_type_of_transformers() -> None:
    types = all_types()
    assert len(types) > 200
    assert {"llama", "qwen3_moe", "gemma3", "qwen2_vl", "bert"} <= set(types)


def test_outcomes(ranks2: RankPool) -> None:
    assert examine("qwen3", "tp2_sp", ranks2).outcome == "exact"
    not_built = examine("pi0", "tp2", ranks2)
    assert not_built.outcome == "not built"
    assert "does not run in one process" in not_built.reason


def refuse(model: nn.Module, config: ParallelConfig, mesh: object) -> nn.Module:
    raise PlanError("three heads, two ranks")


def crash(model: nn.Module, config: ParallelConfig, mesh: object) -> nn.Module:
    raise KeyError("q_proj")


@pytest.mark.parametrize(
    ("parallelize", "outcome", "reason"),
    [
        (refuse, "refused", "three heads, two ranks"),
        (crash, "crashed", "Sharding the model failed: KeyError"),
    ],
)
def test_refusals_and_crashes_are_told_apart(
    monkeypatch: pytest.MonkeyPatch, ranks2: RankPool, parallelize, outcome: str, reason: str
) -> None:
    case = case_of("llama", ParallelConfig(tp=2), parallelize=parallelize)
    monkeypatch.setattr(zoo, "_case", lambda model_type: case)
    entry = examine("llama", "tp2", ranks2)
    assert entry.outcome == outcome
    assert reason in entry.reason


def test_a_type_that_hangs_does_not_stop_the_zoo(ranks2: RankPool) -> None:
    hung = examine("qwen3", "tp2", ranks2, timeout=0.001)
    assert hung.outcome == "crashed"
    assert "did not answer within" in hung.reason
    assert examine("qwen3", "tp2", ranks2).outcome == "exact"


def test_the_page() -> None:
    entries = [
        Entry("a", "tp2", "exact", "", "huggingface", 0.987, "text"),
        Entry("a", "tp2_sp", "wrong", "logits | off\nby a lot", "huggingface", 0.987, "text"),
        Entry("b", "tp2", "not built", "needs scipy"),
    ]
    page = write_page(entries, {name: mode.title for name, mode in MODES.items()})
    assert "| a | text | huggingface | 99% | exact | **wrong** |" in page
    assert "| TP 2 | 1 | 0 | 0 | 0 | 1 |" in page
    assert "| TP 2 + SP | 0 | 1 | 0 | 0 | 1 |" in page
    assert "- a, TP 2 + SP: wrong: logits / off by a lot" in page
    assert "- b: not built: needs scipy" in page
    assert "FSDP" not in page.split("## Not exact")[0].split("| type")[1]


def test_the_command_writes_and_fails_on_a_wrong_one(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    entries = [Entry("a", "tp2", "exact"), Entry("a", "tp2_sp", "wrong", "off")]
    monkeypatch.setattr(zoo, "examine_all", lambda types, modes: iter(entries))
    output = tmp_path / "docs" / "architectures.md"
    result = CliRunner().invoke(
        zoo.main, ["--types", "a", "--output", str(output), "--json", str(tmp_path / "zoo.json")]
    )
    assert result.exit_code == 1
    assert "1 exact, 1 wrong" in result.output
    assert "**wrong**" in output.read_text()
    assert CliRunner().invoke(zoo.main, ["--modes", "tp3"]).exit_code == 2


def test_a_run_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """Types that an interrupted run finished are not run again, and one that it had begun is."""
    asked: list[str] = []

    def examine_all(types: list[str], modes: list[str]) -> Iterator[Entry]:
        asked[:] = types
        yield from (Entry(name, mode, "exact") for name in types for mode in modes)

    monkeypatch.setattr(zoo, "examine_all", examine_all)
    earlier, page = tmp_path / "zoo.json", tmp_path / "page.md"
    found = [Entry("a", "cp2", "exact"), Entry("a", "cp2_tp2", "exact"), Entry("b", "cp2", "not built"),
             Entry("c", "cp2", "exact")]  # fmt: skip
    earlier.write_text(json.dumps([asdict(entry) for entry in found]))
    told = ["--types", "a,b,c,d", "--context", "--modes", "cp2,cp2_tp2", "--output", str(page), "--json", str(earlier)]
    result = CliRunner().invoke(zoo.main, [*told, "--resume"])
    assert result.exit_code == 0, result.output
    assert asked == ["c", "d"]
    assert "6 exact, 1 not built" in result.output
    assert "| c |  | exact | exact |" in page.read_text()
    assert CliRunner().invoke(zoo.main, ["--resume"]).exit_code == 2


# One type for every plan source and every style: dense, q/k norms, packed weights, experts, latent attention, ties,
# per-layer heads, key-value heads shared between layers, convolutions, images.
SPREAD = (
    "aya_vision", "cohere2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe", "exaone4", "flex_olmo", "gemma2",
    "gemma3", "glm", "glm4_moe", "gpt2", "gpt_neox", "gpt_oss", "granite", "granitemoe", "helium", "hunyuan_v1_moe",
    "internvl", "laguna", "llama", "llama4_text", "mistral", "mixtral", "nanochat", "olmo2", "olmoe", "persimmon",
    "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen2_vl", "qwen3", "qwen3_moe", "smollm3", "starcoder2",
    "stablelm",
)  # fmt: skip


# transformers 5.17 has no rules for their experts, which stay whole there; versions up to 5.22 were not tried.
WHOLE_EXPERTS = ("gpt_oss", "granitemoe") if Version(transformers.__version__) < Version("5.23") else ()


@pytest.mark.parametrize("model_type", SPREAD)
def test_a_spread_of_architectures_is_exact(ranks2: RankPool, model_type: str) -> None:
    entry = examine(model_type, "tp2_sp", ranks2)
    assert entry.outcome == "exact", entry.reason
    # Exact because nothing was cut would be no feat.
    assert entry.sharded_fraction > (0.1 if model_type in WHOLE_EXPERTS else 0.4)


def test_plans_alone_need_no_ranks() -> None:
    entry = plan_of("qwen3")
    assert (entry.outcome, entry.plan_source) == ("planned", "huggingface")
    assert plan_of("gemma4_assistant").outcome == "not built"
