"""The command as a program: what it says when it cannot, when the system refuses, and when it is told to stop."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from transformers import AutoConfig

from shardwright import ParallelConfig
from shardwright.cli import main
from shardwright.cli.sharding import sharding
from shardwright.distributed.models.build import build_on_meta
from shardwright.errors import ConfigError, RunError, from_system

CONFIG = """
model:
  config: {model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2}
tokenizer: {vocab_size: 300}
data: {paths: "stdlib:json", include: "*.py", sequence_length: 24}
output: {dir: run, tensorboard: false}
steps: 2
device: cpu
"""


def _run(folder: Path, *arguments: str, limit: Callable[[], None] | None = None) -> subprocess.CompletedProcess[str]:
    (folder / "run.yaml").write_text(CONFIG)
    command = [sys.executable, "-m", "shardwright.cli", *arguments]
    return subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        errors="replace",
        preexec_fn=limit,
        timeout=250,
        check=False,
    )


def _one_error(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("Error: "), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_a_checkpoint_that_is_not_there_is_told_at_once(tmp_path: Path) -> None:
    """Without importing torch, which takes seconds."""
    code = """
import sys
from click.testing import CliRunner
from shardwright.cli import main
for arguments, told in [
    (["inspect", "nothing"], "There is no nothing"),
    (["export", "nothing", "out"], "There is no nothing"),
    (["inspect", "."], "is no training checkpoint"),
    (["inspect", "x" * 300], "no usable path"),
]:
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 1
    assert told in done.stderr, done.stderr
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["train", "run.yaml", f"output.dir={'a' * 300}"], "File name too long"),
        (["train", "run.yaml", "output.dir=~nobody-of-this-name/x"], "Could not determine home directory"),
        (["train", "run.yaml", "data.paths=~nobody-of-this-name"], "Could not determine home directory"),
        (["train", f"{'b/' * 3000}run.yaml"], "File name too long"),
        (["train", "run.yaml", "steps=\udcff"], "text that is no Unicode"),
        (["train", "run.yaml", "optimizer.lr=.nan"], "lr is nan; it must be a finite number above 0"),
        (["train", "run.yaml", "optimizer.lr=.inf"], "lr is inf"),
        (["train", "run.yaml", "optimizer.betas=[0.9, 0.9, 0.9]"], "it must be two numbers"),
        (["train", "run.yaml", "step_timeout=.nan"], "step_timeout is nan"),
        (["train", "run.yaml", "ranks=1000000", "batch_size=1000000"], "ranks on this machine, which has"),
        (["train", "run.yaml", "batch_size=1099511627776"], "batch_size is 1099511627776; it must be at most"),
        (["train", "run.yaml", "data.sequence_length=1099511627776"], "sequence_length is 1099511627776"),
        (["train", "run.yaml", "model.config.num_hidden_layers=-1"], "cannot be negative"),
        (["train", "run.yaml", "model.config.attn_implementation=a/b"], "a kernel of the hub"),
        (["train", "run.yaml", "model.config.architectures=5"], "architectures"),
    ],
)
def test_what_cannot_be_is_one_paragraph(tmp_path: Path, arguments: list[str], told: str) -> None:
    assert told in _one_error(_run(tmp_path, *arguments))
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_a_model_that_no_memory_holds_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a rank, for all of them."""
    (tmp_path / "run.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, ["train", "run.yaml", "ranks=1", "model.config.hidden_size=1048576"])
    assert "GiB in all" in done.stderr
    assert done.stderr.count("Error: ") == 1
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("size", "told"), [("hidden_size", "cannot be made from"), ("num_hidden_layers", "more than 1,000 modules")]
)
def test_a_model_that_cannot_be_built_is_refused(monkeypatch: pytest.MonkeyPatch, size: str, told: str) -> None:
    monkeypatch.setattr("shardwright.distributed.models.build._MODULES", 1000)  # of 100,000, which take a while
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 300, size: 2**40}
    with pytest.raises(ConfigError, match=told):
        build_on_meta(AutoConfig.for_model("llama", **sizes))


@pytest.mark.parametrize(
    ("limit", "room", "told"),
    [
        (resource.RLIMIT_NOFILE, 24, "may have 24 files open at once (ulimit -n)"),
        (resource.RLIMIT_AS, 400 * 2**20, "bytes of address space (ulimit -v)"),
    ],
)
def test_limits_of_the_system_are_told(tmp_path: Path, limit: int, room: int, told: str) -> None:
    done = _run(tmp_path, "train", "run.yaml", limit=lambda: resource.setrlimit(limit, (room, room)))
    assert told in _one_error(done)


def test_what_the_system_refuses_is_one_of_ours() -> None:
    full = OSError(28, "No space left on device", "run/config.yaml")
    assert str(from_system(full)) == "The system refused: No space left on device ('run/config.yaml')."
    assert "not enough memory" in str(from_system(MemoryError()))
    assert isinstance(from_system(RuntimeError("DefaultCPUAllocator: can't allocate memory")), RunError)
    assert isinstance(from_system(ImportError("libtorch.so: cannot open shared object file")), RunError)
    for other in (RuntimeError("size mismatch"), ValueError("x"), KeyError("x"), ImportError("no module named x")):
        assert from_system(other) is None


@pytest.mark.parametrize(
    ("number", "after"), [(signal.SIGTERM, (0.5, 3.0)), (signal.SIGINT, (3.0,)), (signal.SIGHUP, (0.5,))]
)
def test_a_launcher_that_is_stopped_while_it_imports_or_prepares(
    tmp_path: Path, number: signal.Signals, after: tuple[float, ...]
) -> None:
    (tmp_path / "run.yaml").write_text(CONFIG)
    (tmp_path / "tmp").mkdir()
    environment = {**os.environ, "TMPDIR": str(tmp_path / "tmp")}
    command = [sys.executable, "-m", "shardwright.cli", "train", "run.yaml", "steps=100000"]
    for seconds in after:
        with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
                              text=True) as process:  # fmt: skip
            while process.poll() is None and not _listens(process.pid):  # Python itself may take a second to start
                time.sleep(0.01)
            time.sleep(seconds)
            process.send_signal(number)
            _, error = process.communicate(timeout=60)
        assert process.returncode == 1
        assert error.startswith(f"Error: Stopped by {number.name}"), error
        assert error.count("\n") == 1
        assert not [name for name in os.listdir(tmp_path / "tmp") if name.startswith("shardwright-")]


def _listens(process: int) -> bool:
    """Whether a process has a handler for SIGTERM."""
    caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{process}/status").read_text())
    assert caught is not None
    return bool(int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)


def test_compiled_code_that_swallows_a_signal_does_not_hide_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """numpy, interrupted while it is imported, raises an ImportError, and a panic in Rust a ValueError of a library."""

    def interrupted(*_: object) -> None:
        with contextlib.suppress(BaseException):
            signal.raise_signal(signal.SIGINT)
        raise ImportError("cannot load module more than once per process")

    monkeypatch.setattr("shardwright.checkpoint.run_info.find_checkpoint", interrupted)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as ended:
        main(["inspect", "run"])
    assert ended.value.code == 1
    assert capsys.readouterr().err == "Error: Stopped by SIGINT.\n"
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_that_is_swallowed_comes_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is raised inside a destructor or a callback is printed and forgotten."""

    def swallows(*_: object) -> None:
        with contextlib.suppress(BaseException):
            signal.raise_signal(signal.SIGTERM)
        for _ in range(1000):
            time.sleep(0.01)

    monkeypatch.setattr("shardwright.checkpoint.run_info.find_checkpoint", swallows)
    began = time.monotonic()
    with pytest.raises(SystemExit):
        main(["inspect", "run"])
    assert time.monotonic() - began < 5
    assert capsys.readouterr().err == "Error: Stopped by SIGTERM.\n"


def test_what_nohup_ignores_stays_ignored(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(CONFIG)
    command = [sys.executable, "-m", "shardwright.cli", "train", "run.yaml", "ranks=1"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )  # fmt: skip
    with process:
        while process.poll() is None:
            process.send_signal(signal.SIGHUP)
            time.sleep(0.5)
        assert process.returncode == 0, process.communicate()[1]


@click.command()
@click.argument("model")
@sharding(dp_shard=1, precision="bf16")
def _command(model: str, config: ParallelConfig) -> None:
    click.echo(f"{model} {config.to_dict()}")


def _sharded(*arguments: str) -> str:
    done = CliRunner().invoke(_command, ["llama", *arguments], catch_exceptions=False)
    return done.output.strip()


def test_every_field_of_a_sharding_is_an_option_and_a_key() -> None:
    for name in ("plan", "verify"):
        told = CliRunner().invoke(main, [name, "--help"]).output
        for field in fields(ParallelConfig):
            assert f"--{field.name.replace('_', '-')} " in told
    helps = {option.name: option.help or "" for option in _command.params if isinstance(option, click.Option)}
    for field in fields(ParallelConfig):
        assert helps[field.name].strip()[:1].isalnum() or helps[field.name].startswith('"'), field.name


def test_options_and_keys_say_the_same() -> None:
    config = ParallelConfig(dp_shard=1, precision="bf16")
    expected = config.with_(tp=4, sequence_parallel=True, compile="eager", activation_checkpointing="full")
    options = ("--tp", "4", "--sequence-parallel", "--activation-checkpointing", "--compile", "eager")
    keys = ("tp=4", "sequence_parallel=true", "activation_checkpointing=full", "compile=eager")
    assert _sharded() == f"llama {config.to_dict()}"
    assert _sharded(*options) == f"llama {expected.to_dict()}"
    assert _sharded(*keys) == _sharded(*options)
    assert _sharded("--tp", "2", "tp=4") == _sharded("tp=4")
    inside = _sharded("precision={param: bfloat16, reduce: float32}", "precision.output=float16")
    assert "'precision': {'param': 'bfloat16', 'reduce': 'float32', 'output': 'float16'}" in inside


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("tpp=2", "Unknown key 'tpp'. Did you mean 'tp'?"),
        ("tp", "'tp' is not an override. Write key=value"),
        ("tp=0", "tp is 0; it must be a whole number >= 1"),
        ("tp=two", "tp is 'two'; it must be a whole number"),
        ("precision.params=float32", "sets a key inside 'bf16', which is a single value"),
        ("--shard-ends", "loss_tiles is 0"),
    ],
)
def test_a_wrong_sharding_is_told(argument: str, told: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(told)):
        _sharded(argument, *(["loss_tiles=0"] if argument.startswith("--") else []))
