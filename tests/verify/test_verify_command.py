"""The command: its exit code, its JSON, and one clear paragraph for bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from transformers import Qwen3Config

from shardwright.cli import main


def run(*args: str) -> Result:
    return CliRunner().invoke(main, ["verify", *args])


def test_a_checkpoint_folder_from_start_to_end(tmp_path: Path) -> None:
    Qwen3Config(num_hidden_layers=7, tie_word_embeddings=True).save_pretrained(tmp_path)
    options = ("--tp", "2", "--sequence-parallel", "--activation-checkpointing", "--accumulate", "2", "--json")
    result = run(str(tmp_path), *options)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["exact"] is True
    assert report["max_grad_rel_err"] < 1e-5
    assert report["sharded_fraction"] == 1.0
    assert report["world_size"] == 2


def test_the_table_and_the_exit_code_of_a_difference(monkeypatch: pytest.MonkeyPatch, ranks2) -> None:
    import planted

    from shardwright.verify import cli, verify

    def planted_verify(model: str, config, accumulate: int, device: str):
        return verify(model, config, accumulate=accumulate, parallelize=planted.q_norm_left_out, pool=ranks2)

    monkeypatch.setattr(cli, "verify", planted_verify)
    result = run("qwen3", "--tp", "2")
    assert result.exit_code == 1
    assert "NOT exact" in result.stdout
    assert "first to differ in backward" in result.stdout
    assert "self_attn" in result.stdout


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("qwen33",), "Did you mean qwen3"),
        (("no/such/config.json",), "There is no no/such/config.json"),
        (("qwen3", "--tp", "0"), "tp is 0; it must be a whole number >= 1"),
        (("qwen3", "--accumulate", "0"), "accumulate is 0; it must be a whole number >= 1"),
        (("clip",), "transformers has no language model for a CLIPConfig"),
    ],
)
def test_bad_input_is_one_paragraph(args: tuple[str, ...], says: str) -> None:
    result = run(*args)
    assert result.exit_code == 1
    assert says in result.stderr
    assert result.stderr.strip().count("\n") == 0
    assert "Traceback" not in result.stderr
