"""Optimizers and schedules by name: the same as made by hand, or one clear error before any rank starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import SchedulerType, get_scheduler

from shardwright.errors import ConfigError, ShardwrightError
from shardwright.train.config import load_config
from shardwright.train.optim import check_optimizer, kept, make_optimizer
from shardwright.train.schedule import check_schedule, make_schedule, set_step
from shardwright.train.sections import OptimizerSettings, ScheduleSettings

STEPS, WARMUP, LR = 20, 3, 0.5
OPTIONS: dict[str, dict[str, Any]] = {
    "warmup_stable_decay": {"num_decay_steps": 5},
    "cosine_with_restarts": {"num_cycles": 2},
    "cosine_with_min_lr": {"min_lr": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
}
NAMES = [one.value for one in SchedulerType if one.value not in ("reduce_lr_on_plateau", "greedy")]


def rates(optimizer: Any, schedule: Any, steps: int) -> list[float]:
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("name", NAMES)
def test_schedules_are_those_of_transformers(name: str) -> None:
    settings = ScheduleSettings(name=name, warmup_steps=WARMUP, options=OPTIONS.get(name, {}))
    check_schedule(settings, LR, STEPS)
    theirs = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=LR)
    wanted = rates(theirs, get_scheduler(name, theirs, WARMUP, STEPS, OPTIONS.get(name)), STEPS)
    ours = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=LR)
    schedule = make_schedule(ours, settings, LR, STEPS // 2)
    set_step(schedule, 0, STEPS)  # as a resumed run, which keeps the steps that it began with
    assert rates(ours, schedule, STEPS) == pytest.approx(wanted)
    set_step(schedule, 7, STEPS)
    assert ours.param_groups[0]["lr"] == pytest.approx(wanted[7])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "cosin"}, "Did you mean 'cosine'?"),
        ({"name": "reduce_lr_on_plateau"}, "which is no schedule of transformers by steps"),
        ({"name": "warmup_stable_decay"}, "transformers refuses the schedule warmup_stable_decay"),
        ({"name": "linear", "options": {"cycles": 2}}, "transformers refuses the schedule linear"),
        ({"options": {"cycles": 2}}, "set name to one"),
        ({"name": "linear", "final_fraction": 0.5}, "takes its own arguments in options"),
    ],
)
def test_a_schedule_that_cannot_be_is_told(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_schedule(ScheduleSettings(**settings), LR, STEPS)
    assert message in str(error.value)


def test_optimizers_get_what_they_take() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    made = make_optimizer(model, OptimizerSettings("sgd", options={"momentum": 0.9}))
    assert (type(made), made.defaults["momentum"]) == (torch.optim.SGD, 0.9)
    assert [group["weight_decay"] for group in made.param_groups] == [0.1, 0.0]
    made = make_optimizer(model, OptimizerSettings("torch.optim.RAdam", betas=(0.8, 0.9)))
    assert (type(made), made.defaults["betas"]) == (torch.optim.RAdam, (0.8, 0.9))
    assert type(make_optimizer(model, OptimizerSettings("Rprop", options={"foreach": False}))) is torch.optim.Rprop
    assert kept(OptimizerSettings()) == {"step", "exp_avg", "exp_avg_sq"}
    assert kept(OptimizerSettings("sgd")) is kept(OptimizerSettings(options={"amsgrad": True})) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "adamm"}, "which torch.optim does not have. Did you mean 'adam'?"),
        ({"name": "torch.optim.Nothing"}, "which cannot be imported"),
        ({"name": "no_such.package.Lion"}, "which cannot be imported"),
        ({"name": "pathlib.Path"}, "which is no class of optimizers"),
        ({"name": "sgd", "betas": (0.5, 0.5)}, "optimizer.betas is [0.5, 0.5], but SGD has no betas"),
        (
            {"name": "sgd", "options": {"momentun": 0.9}},
            "SGD has no argument 'momentun' (optimizer.options). It has lr",
        ),
        ({"options": {"lr": 1.0}}, "options has lr, which is a key of its own"),
        ({"name": "adafactor"}, "Adafactor of torch works on whole tensors, and the parameters are sharded"),
        ({"name": "transformers.optimization.Adafactor"}, "Adafactor of transformers works on whole tensors"),
        ({"name": "bitsandbytes.optim.AdamW8bit"}, "AdamW8bit of bitsandbytes works on whole tensors"),
        ({"name": "lbfgs"}, "which this training loop cannot run"),
        ({"name": "sgd", "options": {"nesterov": True}}, "SGD cannot be made with these settings"),
    ],
)
def test_an_optimizer_that_cannot_be_is_told(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ShardwrightError) as error:
        check_optimizer(OptimizerSettings(**settings))
    assert message in str(error.value).replace("(0.5, 0.5)", "[0.5, 0.5]")


def test_muon_and_vectors() -> None:
    check_optimizer(OptimizerSettings("muon"))
    with pytest.raises(ConfigError, match=r"Muon cannot be made with these settings for this model: .*2D"):
        make_optimizer(nn.LayerNorm(2), OptimizerSettings("muon"))


def test_code_is_named_on_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: {path: x}\ndata: {paths: x}\noptimizer: {name: my.package.Lion}\n")
    with pytest.raises(ConfigError, match=r"say so on the command line with optimizer\.name=my\.package\.Lion"):
        load_config(file)
    assert load_config(file, ["optimizer.name=my.package.Lion"]).optimizer.runs_code
    file.write_text("model: {path: x}\ndata: {paths: x}\noptimizer: {name: torch.optim.Muon}\n")
    assert not load_config(file).optimizer.runs_code
