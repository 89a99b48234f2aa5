"""``TrainConfig``: everything a training run is made of, as plain data. Importing this imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from shardwright.distributed.config import ParallelConfig, runs_code
from shardwright.errors import ConfigError
from shardwright.settings import apply_overrides, build, read_yaml, search_here
from shardwright.train.rank_settings import RankSettings
from shardwright.train.sections import (
    CheckpointSettings,
    DataSettings,
    LoraSettings,
    ModelSettings,
    OptimizerSettings,
    OutputSettings,
    ScheduleSettings,
    TokenizerSettings,
    between,
    one_of,
    positive,
)
from shardwright.untrusted import shown, usable_path

JOB_CONFIG = "config.yaml"  # of a job folder: the run, as its ranks read it
NOT_FINITE = ("raise", "stop", "skip")
_MOST_SEQUENCES = 2**20  # of one step


@dataclass(frozen=True)
class TrainConfig:
    """A whole training run.

    Attributes:
        steps: optimizer steps.
        epochs: passes over the training sequences, in place of ``steps``: the run's own ``config.yaml`` has the steps
            that they make.
        batch_size: sequences per optimizer step, over all ranks: the same at any mesh.
        accumulation: micro-batches a step is made of, to save memory.
        clip_norm: largest global norm of the gradients; null: no clipping.
        seed: decides the initial weights, the order of the data and dropout.
        device: ``"auto"`` takes GPUs where there are any.
        ranks: processes to start on this machine when not already under torchrun or srun. Null: as many as ``sharding``
            asks for, or one for every GPU where ``sharding.dp_shard`` is -1.
        gpu: what the run's memory and speed are estimated for before it starts: a device that ``shardwright estimate``
            knows, or a file that describes one. Null: the GPUs of this machine, where they are known.
        require_fit: refuse a run whose estimated memory is more than a device has, before its ranks start.
        check_first_step: compare the first step (loss, every gradient, every updated weight) with the same step of the
            unsharded model in one process, and stop when they differ.
        not_finite: what a loss or gradient that is no number does to the run, before the weights are touched; the
            message names the parameter. ``"raise"`` ends it with an error. ``"stop"`` ends it as its last step would:
            checkpoint and model are saved, with the weights of the step before. ``"skip"`` leaves that update out and
            goes on.
        step_timeout: seconds after which a step counts as hanging: the ranks end and say which collective they were in.
        phase_timeout: the same for every other part of a run: starting, waiting for the data, building the model,
            resuming, the first step (which may compile), an evaluation, a checkpoint, the final save. Null: that of a
            step, but at least 60.
    """

    model: ModelSettings
    data: DataSettings
    tokenizer: TokenizerSettings = field(default_factory=TokenizerSettings)
    sharding: ParallelConfig = field(default_factory=ParallelConfig)
    lora: LoraSettings = field(default_factory=LoraSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    output: OutputSettings = field(default_factory=OutputSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    steps: int = 1000
    epochs: float | None = None
    batch_size: int = 8
    accumulation: int = 1
    clip_norm: float | None = 1.0
    seed: int = 0
    device: str = "auto"
    ranks: int | None = None
    gpu: str | None = None
    require_fit: bool = True
    check_first_step: bool = False
    not_finite: str = "raise"
    step_timeout: float = 1800.0
    phase_timeout: float | None = None

    def __post_init__(self) -> None:
        between("steps", self.steps, 1)
        if self.epochs is not None:
            positive("epochs", self.epochs, ", or null")
        for name in ("batch_size", "accumulation"):
            between(name, getattr(self, name), 1, _MOST_SEQUENCES)
        between("seed", self.seed, 0)
        if self.clip_norm is not None:
            positive("clip_norm", self.clip_norm, ", or null for no clipping")
        one_of("not_finite", self.not_finite, NOT_FINITE)
        _ = self.rank_settings  # checks those
        known = self.schedule.steps or (self.steps if self.epochs is None else None)
        if known is not None and self.schedule.warmup_steps > known:
            raise ConfigError(
                f"schedule.warmup_steps is {self.schedule.warmup_steps}, more than the {known} steps of the "
                f"{'schedule' if self.schedule.steps else 'run'}."
            )
        if self.model.path is None and self.tokenizer == TokenizerSettings():
            raise ConfigError(
                "A model from scratch brings no tokenizer. Set tokenizer.vocab_size to train one on the text, or "
                "tokenizer.path to a saved one."
            )
        if self.lora.r and self.model.path is None:
            raise ConfigError("lora adapts a model that is there already. Set model.path, or leave lora out.")
        if self.lora.r and self.sharding.engine != "fsdp2":
            raise ConfigError(f"lora is trained with sharding.engine fsdp2; it is {self.sharding.engine}.")
        if self.tokenizer.vocab_size is not None and self.data.format != "text":
            raise ConfigError(
                f"tokenizer.vocab_size trains a tokenizer on plain text, but data.format is {self.data.format}. Set "
                "tokenizer.path to a saved tokenizer, or leave tokenizer out for the one in model.path."
            )
        if self.data.sequence_length % self.sharding.cp:
            raise ConfigError(
                f"data.sequence_length is {self.data.sequence_length}, which sharding.cp = {self.sharding.cp} "
                "does not divide."
            )

    @property
    def rank_settings(self) -> RankSettings:
        """What starting, joining and watching the ranks need of this config.

        Raises:
            ConfigError: one of them cannot work.
        """
        return RankSettings(self.sharding, self.device, self.ranks, self.step_timeout, self.phase_timeout)

    def check_ranks(self, world_size: int) -> None:
        """Whether the batch can be dealt out to ``world_size`` ranks.

        Raises:
            ConfigError: the degrees do not fit the world size, or the batch does not divide.
        """
        degrees = self.sharding.degrees(world_size)
        share = degrees.data_ranks * self.accumulation
        if self.batch_size % share:
            fit = max(self.batch_size // share, 1) * share
            raise ConfigError(
                f"batch_size is {self.batch_size} sequences, which cannot be dealt out evenly to dp_replicate "
                f"({degrees.dp_replicate}) x dp_shard ({degrees.dp_shard}) x accumulation ({self.accumulation}) = "
                f"{share} micro-batches. Set batch_size to a multiple of {share}, for example {fit}."
            )

    def check_folders(self) -> None:
        """Whether there are the folders that the run reads.

        Raises:
            ConfigError: with the key that names one that is not there.
        """
        for key, path in (("model.path", self.model.path), ("tokenizer.path", self.tokenizer.path)):
            if path is not None and not usable_path(path, key, ConfigError).is_dir():
                raise ConfigError(f"{key} is {shown(path)}, and there is no such folder here. It is read from a disk.")

    def let_code_be_found(self) -> None:
        """Where the run names code, which the command line alone can, it may be where the command was given."""
        if runs_code(self.sharding.plan) or self.optimizer.runs_code:
            search_here()

    def to_yaml(self) -> str:
        """The whole config, defaults filled in, as YAML that :func:`load_config` reads back."""
        return yaml.safe_dump(_plain(asdict(self)), sort_keys=False)


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> TrainConfig:
    """The run described by a YAML file, with ``section.key=value`` overrides applied.

    Raises:
        ConfigError: one paragraph that names the key at fault and what it could be; a plan in the file that is Python
            code, which only an override may name.
    """
    overrides = list(overrides)
    config = read_config(path, overrides)
    named = {text.partition("=")[0] for text in overrides}
    plan, optimizer = config.sharding.plan, config.optimizer
    if runs_code(plan) and not named & {"sharding", "sharding.plan"}:
        raise ConfigError(f"{_names_code(path, 'sharding.plan', plan)} A plan that is saved as YAML needs no trust.")
    if optimizer.runs_code and not named & {"optimizer", "optimizer.name"}:
        raise ConfigError(_names_code(path, "optimizer.name", optimizer.name))
    return config


def _names_code(path: str | Path, key: str, value: str | None) -> str:
    return (
        f"{key} in {path} is {shown(value)}, which names Python code. A config does not run code by itself: read it, "
        f"and if you trust it say so on the command line with {key}={value}."
    )


def read_config(path: str | Path, overrides: Iterable[str] = ()) -> TrainConfig:
    """As :func:`load_config`, of a file that this program has written: it may name code."""
    data = apply_overrides(read_yaml(Path(path)), overrides)
    for section in ("model", "data"):
        if section not in data:
            raise ConfigError(
                f"{path} has no section {section!r}; runs/quickstart.yaml, which shardwright demo writes, has both."
            )
    if data.get("epochs") is not None and data.get("steps") is not None:
        raise ConfigError(
            f"epochs is {shown(data['epochs'])} and steps is {shown(data['steps'])}; give one of the two."
        )
    return build(TrainConfig, data)


def _plain(value: Any) -> Any:
    """Tuples as lists, for YAML."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value
