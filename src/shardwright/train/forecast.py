"""What a run will take, told before its ranks start, and what it took beside it afterwards."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from shardwright.checkpoint.adapted import put_adapters
from shardwright.distributed.models.build import build_on_meta
from shardwright.distributed.replay.reading import ModelReading
from shardwright.errors import ConfigError
from shardwright.estimate.estimating import Estimate, estimate
from shardwright.estimate.hardware import Machine, known_machine, load_machine
from shardwright.estimate.workload import Workload
from shardwright.train.config import TrainConfig
from shardwright.train.lora import lora_config
from shardwright.train.meeting import device_type
from shardwright.train.model import model_config
from shardwright.train.prepare import TOKENIZER, Say
from shardwright.train.sections import OptimizerSettings
from shardwright.train.tokenizer import load_tokenizer

_FILE = "forecast.json"  # of a job folder
_GIB = 2**30


@dataclass(frozen=True)
class Forecast:
    """What was estimated, for the ranks to tell beside what they measure.

    Attributes:
        tensors: bytes of the tensors of a rank at their peak.
        needed: bytes that are needed on its device, allowances included.
        tokens_per_second: of all ranks together.
    """

    tensors: int
    needed: int
    tokens_per_second: float

    @classmethod
    def read(cls, job: Path) -> Forecast | None:
        """What :func:`forecast` left in the job folder; None where nothing was estimated."""
        path = job / _FILE
        return cls(**json.loads(path.read_text())) if path.exists() else None


def forecast(config: TrainConfig, job: Path, ranks: int, say: Say) -> None:
    """Estimate a step, tell it, and leave it in the job folder. Nothing is done on devices that no file describes.

    Args:
        job: the folder that :func:`shardwright.train.prepare.prepare` filled.

    Raises:
        ConfigError: the run needs more memory than a device has, and ``require_fit`` is true; ``gpu`` is not known.
        ShardwrightError: the sharding is one that :func:`shardwright.parallelize` refuses.
    """
    machine = _machine(config)
    if machine is None or config.sharding.engine != "fsdp2":
        return
    found = estimate(_reading(config, job), config.sharding, _workload(config, ranks), machine, gpus=ranks)
    device, together = machine.device, found.speed.tokens_per_second * ranks
    need = f"{found.memory / _GIB:.2f} of {device.memory / _GIB:.2f} GiB on each {device.name}"
    if not found.fits and config.require_fit:
        raise ConfigError(_does_not_fit(found, need))
    say(
        f"Estimated: {need}, {found.peak.total / _GIB:.2f} of them tensors; {found.speed.step:.3g} s a step, "
        f"{together:,.0f} tokens/s on all ranks, waiting for {found.speed.waits_for[0]} most."
    )
    (job / _FILE).write_text(json.dumps(asdict(Forecast(found.peak.total, found.memory, together))))


def _does_not_fit(found: Estimate, need: str) -> str:
    name, size = max(found.peak.parts.items(), key=lambda part: part[1])
    return (
        f"This run does not fit: a rank needs {need}, {-found.free / _GIB:.2f} GiB too much. At its peak, "
        f"{found.peak.phase} of {found.peak.where or 'what is outside of the blocks'}, the largest part is {name} with "
        f"{size / _GIB:.2f} GiB. shardwright suggest searches for a layout that fits. To start it all the same, set "
        "require_fit=false."
    )


def beside(told: Forecast, speeds: list[float], memory_gib: float, on_gpu: bool) -> str:
    """What was measured, and what had been estimated.

    Args:
        speeds: tokens a second on all ranks, of the recorded steps.
    """
    held = "allocated" if on_gpu else "resident, code and libraries among them"
    words = [f"{memory_gib:.2f} GiB {held} (estimated: {told.tensors / _GIB:.2f} GiB of tensors)"]
    if speeds:
        middle = sorted(speeds)[len(speeds) // 2]
        words.append(f"{middle:,.0f} tokens/s (estimated: {told.tokens_per_second:,.0f})")
    return f"Measured: {', '.join(words)}."


def _machine(config: TrainConfig) -> Machine | None:
    """As ``gpu`` says; else that of this machine's GPUs, where a file describes them."""
    if config.gpu is not None:
        return load_machine(config.gpu)
    return known_machine(torch.cuda.get_device_name(0)) if device_type(config.rank_settings) == "cuda" else None


def _reading(config: TrainConfig, job: Path) -> ModelReading:
    architecture = model_config(config.model, load_tokenizer(str(job / TOKENIZER)))
    made = build_on_meta(architecture, AutoModelForCausalLM, dtype=getattr(torch, config.model.dtype))
    model: nn.Module = put_adapters(made, lora_config(config.lora))[0] if config.lora.r else made
    return ModelReading(model)


def _workload(config: TrainConfig, ranks: int) -> Workload:
    degrees = config.sharding.degrees(ranks)
    each = config.batch_size // (degrees.data_ranks * config.accumulation)
    name = _optimizer(config.optimizer, on_gpu=device_type(config.rank_settings) == "cuda")
    return Workload(config.data.sequence_length, each, config.accumulation, name)


def _optimizer(settings: OptimizerSettings, *, on_gpu: bool) -> str:
    """The rule of memory that counts; an optimizer that has none is counted as AdamW, which keeps most."""
    name, options = settings.name.lower().rpartition(".")[2], settings.options
    rules: dict[str, Callable[[dict[str, Any]], str]] = {
        "sgd": lambda given: "sgd_momentum" if given.get("momentum") else "sgd",
        "adafactor": lambda given: "adafactor",
        "muon": lambda given: "muon",
    }
    if name in rules:
        return rules[name](options)
    if options.get("fused"):
        return "adamw_fused"
    return "adamw" if on_gpu and options.get("foreach") is not False else "adamw_loop"
