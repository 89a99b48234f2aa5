"""``shardwright suggest``: what fits, in order; a file that ``train`` reads; what cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from estimate_models import config_of

from shardwright import ParallelConfig
from shardwright.cli import main
from shardwright.train.config import load_config

MACHINE = ["--gpus", "8", "--gpu", "h100-80gb", "--seq-len", "64"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("llama")
    config_of("llama", 2).save_pretrained(folder)
    return str(folder)


def test_the_best_comes_first_and_can_be_trained(llama: str, tmp_path: Path) -> None:
    path = tmp_path / "best.yaml"
    words = ["suggest", llama, *MACHINE, "--global-batch", "16", "--save", str(path), "--json"]
    found = json.loads(CliRunner().invoke(main, words).output)
    times = [made["speed"]["step_seconds"] for made in found]
    assert times == sorted(times)
    assert all(made["fits"] and made["ranks"] == 8 for made in found)
    batches = {
        made["workload"]["batch_size"] * made["workload"]["accumulation"] * 8 // made["sharding"]["tp"]
        for made in found
    }
    assert batches == {16}
    assert {made["sharding"]["tp"] for made in found} == {1, 2, 4}  # 4 heads do not divide by 8
    data = yaml.safe_load(path.read_text())
    data |= {"tokenizer": {"vocab_size": 300}}
    data["data"]["paths"] = ["text.txt"]
    path.write_text(yaml.safe_dump(data))
    settings = load_config(path)
    settings.check_ranks(8)
    expected = {key: value for key, value in found[0]["sharding"].items() if key != "precision"}
    assert {key: settings.sharding.to_dict()[key] for key in expected} == expected
    assert settings.sharding.precision == ParallelConfig(precision="bf16").precision  # type: ignore[arg-type]


def test_more_ranks_than_sequences_split_them_and_experts_are_spread(tmp_path: Path) -> None:
    config_of("mixtral", 2).save_pretrained(tmp_path)
    machine = ["--gpus", "2", "--gpu", "h100-80gb", "--seq-len", "16384", "--global-batch", "1"]
    found = json.loads(CliRunner().invoke(main, ["suggest", str(tmp_path), *machine, "--json"]).output)
    degrees = {(made["sharding"]["cp"], made["sharding"]["tp"], made["sharding"]["ep"]) for made in found}
    assert degrees == {(2, 1, 1), (1, 2, 1), (1, 2, 2)}, "ep is searched without cp"


def test_the_table_says_what_costs_a_place(llama: str, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    words = ["--global-batch", "8", "--objective", "memory", "--html", str(page)]
    text = CliRunner().invoke(main, ["suggest", llama, *MACHINE, *words]).output
    drawn = page.read_text()
    assert drawn.count("<circle") > 10
    assert "memory of the device" in drawn
    assert "the first" in text
    assert "layouts fit" in text
    assert "not possible: " in text
    assert "4 attention heads" in " ".join(text.split())


def test_the_cheapest_layout_may_leave_gpus_unused(llama: str) -> None:
    words = ["suggest", llama, "--gpus", "2", *MACHINE[2:], "--global-batch", "2", "--objective", "cost", "--json"]
    found = json.loads(CliRunner().invoke(main, words).output)
    costs = [made["ranks"] * made["speed"]["step_seconds"] for made in found]
    assert costs == sorted(costs)
    assert {made["ranks"] for made in found} == {1, 2}


def test_a_batch_that_no_layout_can_have(llama: str) -> None:
    words = ["suggest", llama, "--gpus", "64", "--gpu", "h100-80gb", "--seq-len", "64", "--global-batch", "3"]
    assert "cannot be dealt out evenly" in " ".join(CliRunner().invoke(main, words).output.split())


def test_what_is_searched_is_not_given(llama: str) -> None:
    told = CliRunner().invoke(main, ["suggest", llama, *MACHINE, "--global-batch", "16", "tp=2", "ep=2"]).output
    assert told.startswith("Error: suggest searches tp, ep, which cannot be given beside.")
