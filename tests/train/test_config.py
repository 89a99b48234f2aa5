"""The YAML config: overrides, types, and every mistake told in one paragraph with its fix."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import pytest

import shardwright
from shardwright.cli.sharding import sharding
from shardwright.distributed.config import ParallelConfig
from shardwright.errors import ConfigError
from shardwright.train.config import load_config

MINIMAL = """
model: {config: {model_type: llama}}
tokenizer: {vocab_size: 300}
data: {paths: texts}
"""
QUICKSTART = Path(shardwright.__file__).parent / "demo" / "quickstart.yaml"


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(MINIMAL)
    return file


def test_overrides_reach_nested_and_new_keys(config_file: Path) -> None:
    config = load_config(
        config_file,
        [
            "sharding.tp=2",
            "sharding.engine=megatron_fsdp",
            "sharding.precision=bf16",
            "optimizer.lr=3e-4",
            "steps=7",
            "clip_norm=null",
            "model.config.hidden_size=64",
            "data.include=*.py",
            "optimizer.betas=[0.8,1e-1]",
        ],
    )
    assert (config.sharding.tp, config.sharding.engine, config.sharding.precision.param) == (
        2,
        "megatron_fsdp",
        "bfloat16",
    )
    assert config.optimizer.lr == 3e-4  # a string in YAML 1.1
    assert config.optimizer.betas == (0.8, 0.1)
    assert config.model.config == {"model_type": "llama", "hidden_size": 64}
    assert (config.data.paths, config.data.include, config.clip_norm) == (("texts",), ("*.py",), None)


@pytest.mark.parametrize("overrides", [[], ["sharding.precision=bf16", "data.exclude=[a, b]", "clip_norm=null"]])
def test_the_written_config_reads_back_equal(config_file: Path, tmp_path: Path, overrides: list[str]) -> None:
    config = load_config(config_file, overrides)
    (tmp_path / "again.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "again.yaml") == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stepps=3", "Unknown key 'stepps'. Did you mean 'steps'?"),
        ("sharding.tpp=2", "Unknown key 'sharding.tpp'. Did you mean 'tp'?"),
        ("data.seqence_length=8", "Did you mean 'sequence_length'?"),
        ("steps=many", "steps is 'many'; it must be a whole number."),
        ("steps=true", "steps is True; it must be a whole number."),
        ("steps=1.5", "steps is 1.5; it must be a whole number."),
        ("steps=0", "steps is 0; it must be at least 1."),
        ("sharding.tp=0", "sharding: tp is 0; it must be a whole number >= 1."),
        ("sharding.precision=bf17", "precision is 'bf17'; it must be one of model, float32, bf16"),
        ("optimizer.lr=fast", "optimizer.lr is 'fast'; it must be a number."),
        ("optimizer.betas=[0.9]", "betas is [0.9]; it must be two numbers"),
        ("data.paths=[]", "data: paths is empty"),
        ("data.pack=3", "data.pack is 3; it must be true or false."),
        ("model.path=ckpt", "exactly one of path"),
        ("model=llama", "model must be a section of keys and values, not 'llama'."),
        ("tokenizer.vocab_size=null", "A model from scratch brings no tokenizer."),
        ("schedule.warmup_steps=2000", "schedule.warmup_steps is 2000, more than the 1000 steps"),
        ("data.include=[*.py]", "Put quotes around what is in it."),
        ("steps", "'steps' is not an override. Write key=value"),
        ("steps.x=3", "steps is {'x': 3}; it must be a whole number."),
        ("model.config.model_type.x=3", "which is a single value and has no keys"),
        ("device=tpu", "device is 'tpu'; it must be one of auto, cpu, cuda."),
    ],
)
def test_a_mistake_names_the_key_and_the_fix(config_file: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(config_file, [override])
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [1", "is not valid YAML"),
        ("- a\n- b", "must hold keys and values"),
        ("steps: 3", "has no section 'model'"),
    ],
)
def test_a_broken_file_is_told(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "broken.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / "broken.yaml")


def test_a_missing_file_names_those_that_exist(config_file: Path) -> None:
    with pytest.raises(ConfigError, match=r"There is no config file .*rum\.yaml\. There is .*run\.yaml\."):
        load_config(config_file.with_name("rum.yaml"))


@pytest.mark.parametrize(
    ("overrides", "world_size", "message"),
    [
        (["batch_size=7", "sharding.dp_shard=2"], 2, "Set batch_size to a multiple of 2, for example 6."),
        (["batch_size=8", "sharding.dp_shard=2", "accumulation=3"], 2, "x accumulation (3) = 6 micro-batches"),
        (["sharding.tp=2"], 3, "does not divide the world size 3"),
        (["sharding.tp=2", "sharding.dp_shard=2"], 8, "but the world size is 8"),
    ],
)
def test_ranks_that_do_not_fit(config_file: Path, overrides: list[str], world_size: int, message: str) -> None:
    config = load_config(config_file, overrides)
    with pytest.raises(ConfigError) as error:
        config.check_ranks(world_size)
    assert message in str(error.value)


def test_the_quick_start_runs_on_four_ranks() -> None:
    load_config(QUICKSTART).check_ranks(4)


def test_reading_a_config_imports_no_torch() -> None:
    code = f"import sys; from shardwright.train.config import load_config as l; l({str(QUICKSTART)!r})"
    subprocess.run([sys.executable, "-c", code + "; assert 'torch' not in sys.modules"], check=True)


def test_mistakes_are_told_before_torch_is_imported(config_file: Path, tmp_path: Path) -> None:
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "metrics.jsonl").touch()
    code = """
import sys
from shardwright.errors import ConfigError
from shardwright.train.start import start
missing = ["model.config=null", "model.path=/nowhere", "tokenizer.vocab_size=null"]
taken = ["data.paths=stdlib:json", f"output.dir={sys.argv[2]}"]
for overrides in (["sharding.tp=3", "ranks=4"], missing, ["data.paths=/gone"], taken):
    try:
        start(sys.argv[1], overrides)
    except ConfigError as error:
        print(error)
assert "torch" not in sys.modules
"""
    command = [sys.executable, "-c", code, config_file, tmp_path / "done"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    degrees, folder, data, output = done.stdout.splitlines()
    assert "does not divide the world size 4" in degrees
    assert folder.startswith("model.path is '/nowhere', and there is no such folder here.")
    assert data.startswith("'/gone' in data.paths does not exist")
    assert "already holds the results of a run (metrics.jsonl)" in output


def test_code_that_is_named_is_looked_for_here(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An installed command has no folder of its own to look in; ``python -m`` has the current one."""
    monkeypatch.chdir(tmp_path)
    found = []

    @click.command()
    @sharding()
    def command(config: ParallelConfig) -> None:
        found.append(config.plan)

    for let_be_found in (
        lambda: load_config(config_file, ["sharding.plan=a.PLAN"]).let_code_be_found(),
        lambda: load_config(config_file, ["optimizer.name=a.Mine"]).let_code_be_found(),
        lambda: command.main(["--plan", "a.PLAN"], standalone_mode=False),
    ):
        monkeypatch.setattr("sys.path", ["elsewhere"])
        load_config(config_file, ["sharding.plan=a.yaml"]).let_code_be_found()
        assert sys.path == ["elsewhere"]
        let_be_found()
        assert sys.path == ["elsewhere", str(tmp_path)]
    assert found == ["a.PLAN"]
