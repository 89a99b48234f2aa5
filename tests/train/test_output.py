"""The folder of a run: one run at a time, nothing of the user's replaced, and old results until there are new ones."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_train import make_job, train_in_rank

from shardwright.checkpoint.run_info import list_checkpoints, read_info
from shardwright.errors import CheckpointError, ConfigError, ShardwrightError
from shardwright.train.metrics import MetricsFiles
from shardwright.train.output import check_output, output_folder
from shardwright.train.sections import OutputSettings
from shardwright.verify.ranks import RankPool

FSDP2 = "sharding.dp_shard=2"
SAVING = [FSDP2, "steps=4", "checkpoint.every=2"]


def _settings(folder: Path, **settings: Any) -> OutputSettings:
    return OutputSettings(dir=str(folder), **settings)


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl"])
def test_a_file_of_the_user_s_with_the_name_of_ours_stays(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("model: {path: mine}\n")
    for resume in (False, True):
        with pytest.raises(ConfigError, match="was not written by shardwright train"):
            check_output(_settings(tmp_path, overwrite=True), resume)


def test_a_model_folder_that_could_not_be_written_in_the_end_is_told_before_the_run(tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="a link to nothing"):
        check_output(_settings(tmp_path, overwrite=True))
    (tmp_path / "nowhere").mkdir()
    check_output(_settings(tmp_path, overwrite=True))
    (tmp_path / "nowhere" / "config.json").write_text("a base model's")
    with pytest.raises(CheckpointError, match=r"config\.json was not written by Shardwright"):
        check_output(_settings(tmp_path, overwrite=True))


def test_paths_that_cannot_be_used(tmp_path: Path) -> None:
    for path in ("a" * 300, "b/" * 3000, "~nobody-of-this-name", "a\0b"):
        with pytest.raises(ConfigError, match=r"output\.dir is .* no usable path"):
            check_output(_settings(Path(path)))
    with pytest.raises(CheckpointError, match="There is no"):
        check_output(_settings(tmp_path / "run"), resume=str(tmp_path / "gone"))


def test_one_run_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "run"
    with output_folder(_settings(folder)):
        for other in (folder, tmp_path / "link"):
            if other.name == "link":
                other.symlink_to(folder)
            with (
                pytest.raises(ConfigError, match=r"Another run is writing to .* \(process \d+ on "),
                output_folder(_settings(other)),
            ):
                pass
            with pytest.raises(ConfigError, match="Another run is writing"):
                check_output(_settings(other))
    assert not (tmp_path / "deep").exists()  # nothing was written, so it is as before
    with output_folder(_settings(folder)):
        (folder / "metrics.jsonl").touch()
    assert os.listdir(folder) == ["metrics.jsonl"]


def _second_run(job: Path) -> str:
    try:
        train_in_rank(job)
    except ShardwrightError as error:
        return str(error)
    return ""


def test_a_second_run_in_the_same_folder_is_refused_on_every_rank(ranks2: RankPool, tmp_path: Path) -> None:
    config, job = make_job(tmp_path, [FSDP2])
    with output_folder(config.output):
        first, second = ranks2.run(_second_run, job)
    assert "Another run is writing to" in first
    assert second == f"On rank 0: {first}"
    assert not (tmp_path / "run").exists()


def _losses(folder: Path) -> dict[int, float]:
    lines = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines}


@pytest.mark.parametrize("linked", [pytest.param(False, marks=pytest.mark.sweep), True])
def test_overwrite_keeps_the_old_checkpoints_until_there_is_a_new_one(
    ranks2: RankPool, tmp_path: Path, linked: bool
) -> None:
    """Through a link too, which ``shutil.rmtree`` does not follow: the next resume went on from the old run."""
    root = tmp_path / "run" / "checkpoints"
    if linked:
        (tmp_path / "disk").mkdir()
        root.parent.mkdir()
        root.symlink_to(tmp_path / "disk")
    _, job = make_job(tmp_path, [*SAVING, *(["output.overwrite=true"] if linked else [])])
    ranks2.run(train_in_rank, job)
    first = _losses(tmp_path)
    shutil.rmtree(tmp_path / "job")

    # A run that ends before its first checkpoint leaves the old ones, out of the way of a resume.
    _, job = make_job(tmp_path, [*SAVING, "seed=7", "output.overwrite=true", "optimizer.lr=1e30"])
    with pytest.raises(ShardwrightError, match="has loss"):
        ranks2.run(train_in_rank, job)
    assert list_checkpoints(root) == []
    aside = sorted(path.name for path in root.iterdir())
    assert aside == [".step-00000002.replaced", ".step-00000004.replaced"]

    # Resuming finds none of the old run, and begins anew; the first new checkpoint removes them.
    shutil.rmtree(job)
    _, job = make_job(tmp_path, [*SAVING, "seed=8", "checkpoint.resume=true"])
    ranks2.run(train_in_rank, job)
    assert sorted(path.name for path in root.iterdir()) == ["step-00000002", "step-00000004"]
    assert _losses(tmp_path).keys() == first.keys()
    assert _losses(tmp_path)[1] != first[1]
    assert root.is_symlink() == linked


def test_resuming_from_an_older_step_takes_the_later_ones_out_of_the_way(ranks2: RankPool, tmp_path: Path) -> None:
    _, job = make_job(tmp_path, [*SAVING, "schedule.steps=8"])
    ranks2.run(train_in_rank, job)
    first = _losses(tmp_path)
    older = tmp_path / "run" / "checkpoints" / "step-00000002"
    (tmp_path / "run" / "model" / "notes.txt").write_text("mine")
    shutil.rmtree(job)
    more = ["steps=3", "schedule.steps=8", "checkpoint.every=3"]
    _, job = make_job(tmp_path, [FSDP2, *more, f"checkpoint.resume={older}"])
    ranks2.run(train_in_rank, job)
    assert [path.name for path in list_checkpoints(older.parent)] == ["step-00000002", "step-00000003"]
    assert not list(older.parent.glob(".*"))
    assert _losses(tmp_path) == {step: loss for step, loss in first.items() if step <= 3}
    assert (tmp_path / "run" / "model" / "notes.txt").read_text() == "mine"


def test_the_learning_rate_does_not_jump_where_a_run_gets_more_steps(ranks2: RankPool, tmp_path: Path) -> None:
    _, job = make_job(tmp_path, [*SAVING, "schedule.final_fraction=0.25"])
    ranks2.run(train_in_rank, job)
    shutil.rmtree(job)
    base = [FSDP2, "checkpoint.every=2", "checkpoint.resume=true", "schedule.final_fraction=0.25"]
    _, job = make_job(tmp_path, [*base, "steps=6"])
    ranks2.run(train_in_rank, job)
    rates = _rates(tmp_path)
    assert rates[3] == pytest.approx(0.25 * 1e-2)
    assert rates[4:] == [rates[3], rates[3]]
    newest = list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    assert read_info(newest).progress == {"data_step": 6, "schedule_steps": 4}
    shutil.rmtree(job)
    _, job = make_job(tmp_path, [*base, "steps=8", "schedule.steps=16", "optimizer.lr=2e-2"])  # who asks for a jump
    ranks2.run(train_in_rank, job)
    assert _rates(tmp_path)[6] > 2 * rates[3]


def _rates(folder: Path) -> list[float]:
    return [json.loads(line)["lr"] for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def _line(step: int, loss: Any = 1.5) -> str:
    return json.dumps({"step": step, "loss": loss}) + "\n"


def test_damaged_metrics_are_told_and_kept_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "metrics.jsonl"
    damage = [
        "{]\n",
        "\x00\x00\n",
        '{"step": "x"}\n',
        "[" * 5000 + "\n",
        _line(2, float("nan")),
        '"\\ud800"\n',
        "x" * 10**6,
    ]
    text = _line(1) + "".join(damage) + "\n" + _line(3) + _line(9) + '{"step": 4, "lo'
    file.write_text(text)
    with MetricsFiles(tmp_path, tensorboard=False, done=3) as files:
        assert files.losses == [1.5, 1.5]
    assert file.read_text() == _line(1) + _line(3)
    assert (tmp_path / "metrics.jsonl.damaged").read_text() == text
    assert "are damaged and left out" in caplog.text
    with MetricsFiles(tmp_path, tensorboard=False, done=1):
        pass
    assert file.read_text() == _line(1)
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl", "metrics.jsonl.damaged"]


def test_a_kill_while_metrics_are_rewritten_leaves_all_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text(_line(1) + _line(2))

    class _KilledError(BaseException):
        pass

    for target in ("pathlib.Path.replace", "os.fsync"):
        with monkeypatch.context() as patch:

            def killed(*_: object) -> None:
                raise _KilledError

            patch.setattr(target, killed)
            with pytest.raises(_KilledError):
                MetricsFiles(tmp_path, tensorboard=False, done=1)
        assert file.read_text() == _line(1) + _line(2)


def test_a_config_does_not_run_code_and_the_command_line_may(tmp_path: Path) -> None:
    """Neither the module that someone's config names, nor one that lies where the command is given."""
    mark = tmp_path / "ran"
    for name in ("planted", "typing_extensions", "sitecustomize"):
        (tmp_path / f"{name}.py").write_text(f"open({str(mark)!r}, 'w')\nclass Mine: pass")
    run = {
        "model": {
            "config": {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
        },
        "tokenizer": {"vocab_size": 300},
        "data": {"paths": ["stdlib:json"], "include": ["*.py"], "sequence_length": 24},
        "optimizer": {"name": "planted.Mine"},
        "sharding": {"tp": 2, "plan": "planted.PLAN"},
        "output": {"dir": "run"},
        "steps": 1,
        "device": "cpu",
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    told = _shardwright(tmp_path, "run.yaml")
    assert "names Python code" in told
    assert "sharding.plan=planted.PLAN" in told
    told = _shardwright(tmp_path, "run.yaml", "sharding.plan=planted.PLAN")
    assert "names Python code" in told
    assert "optimizer.name=planted.Mine" in told
    assert not mark.exists()
    told = _shardwright(tmp_path, "run.yaml", "sharding.plan=planted.PLAN", "optimizer.name=planted.Mine")
    assert "is no class of optimizers" in told
    assert mark.exists()


def _shardwright(folder: Path, *arguments: str) -> str:
    """As the installed command does it: the current folder is not where Python looks for modules."""
    code = "from shardwright.cli import main; main()"
    command = [sys.executable, "-P", "-c", code, "train", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False).stderr
