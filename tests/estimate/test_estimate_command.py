"""``shardwright estimate``: the answer first, everything as JSON, refusals with what to do."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from shardwright.cli import main

SIZES = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LARGE = {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128}
MACHINE = ["--gpus", "8", "--gpu", "h100-80gb", "--seq-len", "8192"]


@pytest.fixture
def llama(tmp_path: Path) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SIZES))
    return str(path)


def call(*words: str) -> str:
    return CliRunner().invoke(main, ["estimate", *words]).output


def data(*words: str) -> dict[str, Any]:
    return json.loads(CliRunner().invoke(main, ["estimate", *words, "--json"]).stdout)  # warnings are on the other one


def test_the_answer_comes_first(llama: str) -> None:
    text = " ".join(call(llama, *MACHINE, "activation_checkpointing=full").split())
    assert text.startswith("Yes, it fits: ")
    assert "GiB free. A step takes about" in text
    assert "it waits for" in text
    assert "To change: activation_checkpointing=selective is" in text, "there is room for it, and it is faster"
    larger = " ".join(call(llama, *MACHINE, "--batch-size", "8").split())
    assert larger.startswith("No, it does not fit: ")
    assert "To change: it fits with activation_checkpointing=full" in larger


def test_parts_add_up(llama: str) -> None:
    found = data(llama, *MACHINE, "activation_checkpointing=full")
    memory = found["memory"]
    assert sum(memory["peak"]["parts"].values()) == memory["tensors"]
    added = memory["tensors"] + memory["context"] + memory["communicators"] + memory["fragmentation"]
    assert added == memory["needed"] == memory["device"] - memory["free"]
    assert found["ranks"] == 8
    assert found["activations_from"] == "trace"
    assert memory["peak"]["parts"]["optimizer"] == pytest.approx(8 * 8.03e9 / 8, rel=0.01)


def test_adapters_have_little_state(llama: str) -> None:
    whole = data(llama, *MACHINE, "--weights", "bfloat16")["memory"]["peak"]["parts"]
    lora = data(llama, *MACHINE, "--weights", "bfloat16", "--lora", "16")["memory"]["peak"]["parts"]
    assert lora["optimizer"] < whole["optimizer"] / 50


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu", "h1000"], "There is no device 'h1000'"),
        (["tp=3"], "does not divide the world size 8"),
        (["--gpus", "12", "tp=3"], "32 attention heads"),
        (["tpp=2"], "Unknown key 'tpp'. Did you mean 'tp'?"),
        (["tp"], "'tp' is not an override. Write key=value"),
        (["--optimizer", "lion"], "optimizer is 'lion'"),
        (["engine=megatron_fsdp"], "The peak of a step under megatron_fsdp is not known"),
    ],
)
def test_what_cannot_be_is_told(llama: str, words: list[str], message: str) -> None:
    assert message in " ".join(call(llama, *MACHINE, *words).split())


def test_a_file_describes_another_device(llama: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "name: mine\nmemory_mib: 1000\nteraflops: {float32: 1}\nmemory_gb_per_s: 10\nfabric: pcie4\ngpus_per_node: 8\n"
        "source: me\n"
    )
    assert "on each mine" in " ".join(call(llama, *MACHINE, "--gpu", str(path)).split())
    path.write_text("name: mine\n")
    assert "lacks keys that a device needs" in " ".join(call(llama, *MACHINE, "--gpu", str(path)).split())


def test_405_billion_parameters_on_16384_ranks(tmp_path: Path) -> None:
    """In a process of its own: processor seconds (this machine may be busy) and memory, imports included."""
    (tmp_path / "config.json").write_text(json.dumps(SIZES | LARGE))
    words = ["estimate", str(tmp_path), "--gpus", "16384", "--gpu", "h100-80gb", "--seq-len", "8192", "--json", "tp=8",
             "sequence_parallel=true", "dp_replicate=16", "activation_checkpointing=full"]  # fmt: skip
    code = (
        "import resource, sys\nfrom shardwright.cli import main\nmain(sys.argv[1:], standalone_mode=False)\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "print(used.ru_utime + used.ru_stime, used.ru_maxrss / 2**20, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    seconds, gib = map(float, done.stderr.strip().splitlines()[-1].split())
    assert seconds < 15
    assert gib < 2
    assert json.loads(done.stdout)["fits"]


def test_the_page_is_one_file_that_asks_nobody(llama: str, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    call(llama, *MACHINE, "tp=2", "sequence_parallel=true", "activation_checkpointing=full", "--html", str(path))
    text = path.read_text()
    assert len(text) < 2**20
    assert "http" not in text
    assert "<script" not in text
    assert '<h1 class="good">Yes, it fits: ' in text
    assert text.count("<svg") == 4, "the mesh, memory, a step, a block"
    assert "backward, model.layers.31" in text
    assert "rank 7: tp 1, cp 0, shard 3, replica 0" in text
    assert "2 reduce-scatter" in text
    shown_in_a_browser(path)


def shown_in_a_browser(page: Path) -> None:
    """A screenshot, where there is a browser, has more than the colour of the paper."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        return
    picture = page.with_suffix(".png")
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1000,1400", f"--screenshot={picture}"]
    subprocess.run([browser, *words, page.as_uri()], check=True, capture_output=True, timeout=200)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 40_000, "an empty page has a few kilobytes"
