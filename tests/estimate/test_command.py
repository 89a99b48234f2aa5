"""``shardwright plan`` as a user types it."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from estimate_models import config_of
from rich.console import Console

from shardwright import ParallelConfig
from shardwright.cli import main
from shardwright.estimate import predict
from shardwright.estimate.report import bytes_text, count_text, print_report


def plan(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["plan", *arguments])


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    config_of("qwen3 tied").save_pretrained(tmp_path)
    return tmp_path


def test_folder_file_and_type(checkpoint: Path) -> None:
    from_folder, from_file = plan(str(checkpoint)), plan(str(checkpoint / "config.json"))
    assert from_folder.exit_code == 0
    assert from_folder.output == from_file.output
    from_type = plan("qwen3", "--tp", "8")
    assert from_type.exit_code == 0
    assert "Qwen3ForCausalLM  12 B parameters, 32 x model.layers.*" in from_type.output


def test_piped_output_is_plain(checkpoint: Path) -> None:
    output = plan(str(checkpoint), "--sequence-parallel", "--dp-shard", "2").output
    assert output.isascii()
    assert "\nmodel.layers.* x 2" not in output  # every line names its modules in full, for grep
    assert all(line == line.rstrip() for line in output.splitlines())
    (line,) = [line for line in output.splitlines() if line.startswith("model.layers.*.self_attn.q_norm")]
    assert " ".join(line.split()) == "model.layers.*.self_attn.q_norm replicated_with_grad_allreduce plan 16 0 % 128 B"


def test_json(checkpoint: Path) -> None:
    data = json.loads(plan(str(checkpoint), "--json", "--tp", "4", "--precision", "float32").stdout)
    assert data["parallel"]["tp"] == 4
    assert data["parallel"]["precision"]["param"] == "float32"


def test_save_and_pass_back(checkpoint: Path) -> None:
    path = checkpoint / "plan.yaml"
    saved = plan(str(checkpoint), "--save", str(path))
    assert saved.exit_code == 0
    assert f"--plan {path}" in saved.output
    again = plan(str(checkpoint), "--plan", str(path))
    assert "plan from saved: huggingface" in again.output
    assert plan(str(checkpoint), "--save", str(path)).exit_code == 1


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("qwen4",), "Did you mean"),
        (("{folder}/nowhere",), "There is no"),
        (("{folder}/empty",), "no config.json in the folder"),
        (("{folder}/broken.json",), "broken.json is not valid JSON: Expecting property name"),
        (("{folder}/unknown.json",), "cannot read the model config"),
        (("{folder}/activation.json",), "cannot be made from this llama config"),
        (("{folder}", "--tp", "3"), "4 attention heads"),
        (("{folder}", "--tp", "0"), "tp is 0"),
        (("{folder}", "--plan", "{folder}/none.yaml"), "no plan file"),
        (("{folder}", "--plan", "{folder}/glob.yaml"), "matches no module"),
        (("{folder}", "--save", "{folder}/no/plan.yaml"), "cannot be saved"),
    ],
)
def test_refusals_are_one_paragraph_and_exit_code_1(checkpoint: Path, arguments: tuple[str, ...], reason: str) -> None:
    (checkpoint / "empty").mkdir()
    (checkpoint / "broken.json").write_text('{"model_type": "llama",')
    (checkpoint / "unknown.json").write_text('{"model_type": "no_such_model"}')
    (checkpoint / "activation.json").write_text('{"model_type": "llama", "hidden_act": "no_such_activation"}')
    (checkpoint / "glob.yaml").write_text("styles: {layers.*.q_proj: colwise}")
    result = plan(*(argument.format(folder=checkpoint) for argument in arguments))
    assert result.exit_code == 1
    assert reason in " ".join(result.stderr.split())
    assert "\n\n" not in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("width", [80, 120])
def test_tables_fit_a_terminal(width: int) -> None:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, no_color=True, legacy_windows=False)
    print_report(predict("qwen3", ParallelConfig(tp=8, dp_shard=4, sequence_parallel=True, precision="bf16")), console)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    text = "\n".join(lines)
    assert (
        max(map(len, text.replace("\x1b[1m", "").replace("\x1b[0m", "").replace("\x1b[2m", "").splitlines())) <= width
    )
    assert "post_attention_layernorm" in text
    assert ("replicated_with_grad_allreduce" in text) == (width == 120)


def test_numbers_for_people() -> None:
    assert [count_text(n) for n in (7, 4096, 621_500_000, 999_900, 405_853_388_800)] == [
        "7", "4.1 k", "622 M", "1000 k", "406 B",
    ]  # fmt: skip
    assert [bytes_text(n) for n in (0, 100, 2048, 1.5 * 2**30)] == ["-", "100 B", "2 KiB", "1.5 GiB"]
