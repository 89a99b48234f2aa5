"""What the pages say is so: names and arguments exist, commands and keys are accepted, quoted messages are raised."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
import subprocess
from contextlib import chdir
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import pytest
import torch
import torch.distributed as dist
import yaml
from blocks import PAGES, ROOT, Block, blocks
from transformers import AutoConfig, AutoModelForCausalLM

from shardwright.cli import main
from shardwright.distributed.config import ParallelConfig
from shardwright.settings import build
from shardwright.train.config import TrainConfig
from shardwright.verify import RankPool

SHELL = [*blocks("bash"), *blocks("sh"), *blocks("console"), *blocks("")]
_LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)(?:#[^)]*)?\)")


def test_there_are_blocks() -> None:
    assert len(blocks("python")) > 5
    assert len(SHELL) > 5


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python_names_and_arguments_exist(block: Block) -> None:
    tree = ast.parse(block.text)
    known: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "shardwright":
            module = import_module(node.module or "")
            known |= {alias.asname or alias.name: getattr(module, alias.name) for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in known:
            if any(keyword.arg is None for keyword in node.keywords) or any(
                isinstance(argument, ast.Starred) or argument == ast.Constant(...) for argument in node.args
            ):
                continue
            keywords = {str(keyword.arg): None for keyword in node.keywords}
            inspect.signature(known[node.func.id]).bind(*node.args, **keywords)


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_shell_lines_are_accepted(block: Block) -> None:
    subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["make"]:
            assert words[1] in targets
        if words[:1] == ["shardwright"] and words[1:]:
            accept(words[1:])


def accept(words: list[str]) -> None:
    """Parse a command as the command line does, and the keys of a run, or of its sharding, as a training file is."""
    command = main.get_command(click.Context(main), words[0])
    assert command is not None, words[0]
    context = command.make_context(words[0], words[1:])
    for text in context.params.get("overrides", ()):
        path, _, value = text.partition("=")
        keys = path.split(".")
        check_key(keys if words[0] == "train" else ["sharding", *keys], value)


def check_key(path: list[str], value: str) -> None:
    """Raises ConfigError where a training file has no such key or takes no such value."""
    data: Any = yaml.safe_load(value)
    for key in reversed(path):
        data = {key: data}
    base = {"model": {"config": {"model_type": "llama"}}, "tokenizer": {"vocab_size": 300}, "data": {"paths": ["x"]}}
    head = path[0]
    merged = {**base, head: {**base.get(head, {}), **data[head]} if isinstance(data[head], dict) else data[head]}
    if path in (["model", "path"], ["model", "config"]):
        merged["model"] = {"path": "folder"}
    build(TrainConfig, {"output": {"dir": "run"}, **merged})


@pytest.mark.parametrize("block", [b for b in blocks("yaml") if "apiVersion" not in b.text], ids=str)
def test_training_files_are_accepted(block: Block) -> None:
    data = yaml.safe_load(block.text)
    if "model" in data and "data" in data:
        build(TrainConfig, data)


def test_settings_in_the_table_of_layouts_exist() -> None:
    settings = re.findall(r"`(\w+): ([\w]+)`", (ROOT / "docs" / "layout.md").read_text())
    assert len(settings) > 4
    for key, value in settings:
        ParallelConfig.from_dict(
            {"tp": 2, **({"mlp_tiles": 1} if key != "mlp_tiles" else {}), key: yaml.safe_load(value)}
        )


def test_quoted_messages_are_in_the_code() -> None:
    code = " ".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    joined = re.sub(r'"\s+f?"', "", code)
    quoted = re.findall(r"^## (.+)$", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(quoted) > 5
    own = {"A run that does not go on", "environment variable RANK expected"}  # the second is torch's
    assert [message for message in quoted if message not in joined and message not in own] == []


def test_every_measured_number_is_a_result() -> None:
    """Of the tables on the performance page, every row but the headings is a row of a page that a benchmark wrote."""
    written = (ROOT / "benchmarks" / "RESULTS.md").read_text() + (ROOT / "benchmarks" / "RESULTS-GPU.md").read_text()
    lines = (ROOT / "docs" / "performance.md").read_text().splitlines()
    rows = [
        line
        for line, after in zip(lines, [*lines[1:], ""], strict=True)
        if line.startswith("|") and not after.startswith("| ---")
    ]
    assert len(rows) > 100
    assert [row for row in rows if row not in written.splitlines()] == []


def test_links_outside_of_the_site() -> None:
    """Those inside are checked by mkdocs (make docs)."""
    pages = [page for page in PAGES if page.parent == ROOT]
    broken = {(page.name, to) for page in pages for to in _LINK.findall(page.read_text()) if not (ROOT / to).exists()}
    assert broken == set()


def run_in_rank(script: str, folder: str) -> None:
    """A script, on a rank that has its process group already; ``make test-launchers`` starts scripts with torchrun."""
    with chdir(folder), patch.object(dist, "init_process_group") as joins, patch.object(dist, "destroy_process_group"):
        exec(compile(script, "train.py", "exec"), {"__name__": "__main__"})
    joins.assert_called_once_with()


def test_the_script_of_the_start_page_runs(ranks2: RankPool, tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "qwen3", hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, vocab_size=128,
    )  # fmt: skip
    before = AutoModelForCausalLM.from_config(config)
    before.save_pretrained(tmp_path / "path" / "to" / "qwen3")
    script = next(block for block in blocks("python") if block.page == "docs/start.md")
    assert script.text.strip() in next(block for block in blocks("python") if block.page == "README.md").text
    ranks2.run(run_in_rank, script.text, str(tmp_path))
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned", output_loading_info=True)
    assert not any(loading.values())
    assert model.config.model_type == "qwen3"
    assert not torch.equal(model.lm_head.weight, before.lm_head.weight)
