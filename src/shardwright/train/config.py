"""``TrainConfig``: everything a training run is made of, as plain data. Importing this imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from shardwright.distributed.config import DTYPES, ParallelConfig, runs_code
from shardwright.errors import ConfigError
from shardwright.settings import apply_overrides, build, read_yaml
from shardwright.untrusted import shown

DEVICES = ("auto", "cpu", "cuda")
JOB_CONFIG = "config.yaml"  # of a job folder: the run, as its ranks read it
NOT_FINITE = ("raise", "stop", "skip")
_LEAST_PHASE = 60.0  # seconds: importing torch and transformers in several ranks at once takes some
_MOST_TOKENS = 2**27  # of one sequence, or of a vocabulary
_NAME_A_PLAN = ("sharding", "sharding.plan")  # the keys of overrides that do
_MOST_SEQUENCES = 2**20  # of one step


@dataclass(frozen=True)
class ModelSettings:
    """Which model is trained; exactly one of ``path`` and ``config``.

    Attributes:
        path: a Hugging Face checkpoint directory to go on training from.
        config: a model to train from scratch: a ``config.json`` (or the directory that holds one), or a mapping with
            ``model_type`` and any other keys of that model's transformers config.
        dtype: dtype the parameters are kept in between steps (``sharding.precision`` is what they compute in).
    """

    path: str | None = None
    config: str | dict[str, Any] | None = None
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if (self.path is None) == (self.config is None):
            raise ConfigError(
                "give exactly one of path (a checkpoint directory to start from) and config (a model from scratch)."
            )
        _one_of("dtype", self.dtype, DTYPES)


@dataclass(frozen=True)
class TokenizerSettings:
    """Where the tokenizer comes from. Nothing given: the one in ``model.path``.

    Attributes:
        path: a directory with a saved tokenizer.
        vocab_size: train a byte-level BPE of this many tokens on the training text.
    """

    path: str | None = None
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        if self.path is not None and self.vocab_size is not None:
            raise ConfigError("give path (a saved tokenizer) or vocab_size (train one), not both.")
        if self.vocab_size is not None and not 257 <= self.vocab_size <= _MOST_TOKENS:
            raise ConfigError(
                f"vocab_size is {self.vocab_size}; 256 bytes and an end-of-text token need at least 257, and "
                f"{_MOST_TOKENS:,} are the most."
            )


@dataclass(frozen=True)
class DataSettings:
    """The text and how it becomes sequences.

    Attributes:
        paths: files, folders or globs. A ``.jsonl`` file is read as one JSON object a line, any other as one text.
            ``stdlib:`` at the start stands for the folder of the running Python's standard library.
        include: file names (globs) taken from a folder.
        exclude: globs over whole paths that are left out.
        text_key: the key of a JSONL line that holds the text.
        sequence_length: tokens the model sees at once.
        pack: put texts one after the other (an end-of-text token between them) and cut at ``sequence_length``, so that
            no position is wasted. False: every text starts a sequence of its own, padded at the end; the padding is
            not trained on.
        validation: sequences held out to measure the loss on, and never trained on.
    """

    paths: tuple[str, ...] = ()
    include: tuple[str, ...] = ("*.txt", "*.md", "*.jsonl")
    exclude: tuple[str, ...] = ()
    text_key: str = "text"
    sequence_length: int = 1024
    pack: bool = True
    validation: int = 0

    def __post_init__(self) -> None:
        if not self.paths:
            raise ConfigError("paths is empty; name the text files, folders or globs to train on.")
        _between("sequence_length", self.sequence_length, 2, _MOST_TOKENS)
        _between("validation", self.validation, 0)


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW (Loshchilov and Hutter 2019). Weight decay acts on matrices only, not on norms and biases."""

    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1

    def __post_init__(self) -> None:
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas is {shown(list(self.betas))}; it must be two numbers in [0, 1).")
        _positive("lr", self.lr)
        for name in ("eps", "weight_decay"):
            _between(name, getattr(self, name), 0)


@dataclass(frozen=True)
class ScheduleSettings:
    """The learning rate over the run: linear warm-up, then half a cosine.

    Attributes:
        warmup_steps: steps until ``optimizer.lr`` is reached.
        final_fraction: the share of ``optimizer.lr`` that is left at the last step, and after it.
        steps: how many steps that is; null: the ``steps`` of the run. A run that is resumed keeps those it began with,
            so that more ``steps`` do not make the rate jump, unless they are set here.
    """

    warmup_steps: int = 0
    final_fraction: float = 0.1
    steps: int | None = None

    def __post_init__(self) -> None:
        _between("warmup_steps", self.warmup_steps, 0)
        if self.steps is not None:
            _between("steps", self.steps, 1)
        if not 0 <= self.final_fraction <= 1:
            raise ConfigError(f"final_fraction is {self.final_fraction}; it must be between 0 and 1.")


@dataclass(frozen=True)
class OutputSettings:
    """What a run leaves behind.

    Attributes:
        dir: the folder: ``model/`` (at the end), ``metrics.jsonl``, ``config.yaml`` and TensorBoard events.
        overwrite: replace the results of an earlier run in ``dir``.
        log_every: steps between two lines of metrics.
        validate_every: steps between two measurements on the held-out sequences; 0: at the end only.
        tensorboard: write TensorBoard events; null: where tensorboard is installed.
    """

    dir: str = "runs/train"
    overwrite: bool = False
    log_every: int = 1
    validate_every: int = 0
    tensorboard: bool | None = None

    def __post_init__(self) -> None:
        _between("log_every", self.log_every, 1)
        _between("validate_every", self.validate_every, 0)


@dataclass(frozen=True)
class CheckpointSettings:
    """Checkpoints of the run itself (``dir/checkpoints``): model, optimizer, schedule and random states.

    Attributes:
        every: steps between two checkpoints; there is one at the end too, and one at SIGTERM. 0: none at all.
        keep: how many of the newest stay; the one with the least validation loss stays on top of them.
        resume: true: go on from the newest checkpoint in ``output.dir``, where there is one. A path: from that one.
    """

    every: int = 0
    keep: int = 2
    resume: bool | str = False

    def __post_init__(self) -> None:
        _between("every", self.every, 0)
        _between("keep", self.keep, 1)


@dataclass(frozen=True)
class TrainConfig:
    """A whole training run.

    Attributes:
        steps: optimizer steps.
        batch_size: sequences per optimizer step, over all ranks: the same at any mesh.
        accumulation: micro-batches a step is made of, to save memory.
        clip_norm: largest global norm of the gradients; null: no clipping.
        seed: decides the initial weights, the order of the data and dropout.
        device: ``"auto"`` takes GPUs where there are any.
        ranks: processes to start on this machine when not already under torchrun or srun. Null: as many as ``sharding``
            asks for, or one for every GPU where ``sharding.dp_shard`` is -1.
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
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    output: OutputSettings = field(default_factory=OutputSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    steps: int = 1000
    batch_size: int = 8
    accumulation: int = 1
    clip_norm: float | None = 1.0
    seed: int = 0
    device: str = "auto"
    ranks: int | None = None
    check_first_step: bool = False
    not_finite: str = "raise"
    step_timeout: float = 1800.0
    phase_timeout: float | None = None

    def __post_init__(self) -> None:
        _between("steps", self.steps, 1)
        for name in ("batch_size", "accumulation"):
            _between(name, getattr(self, name), 1, _MOST_SEQUENCES)
        _between("seed", self.seed, 0)
        if self.ranks is not None:
            _between("ranks", self.ranks, 1)
        if self.clip_norm is not None:
            _positive("clip_norm", self.clip_norm, ", or null for no clipping")
        _one_of("device", self.device, DEVICES)
        _one_of("not_finite", self.not_finite, NOT_FINITE)
        _positive("step_timeout", self.step_timeout)
        if self.phase_timeout is not None:
            _positive("phase_timeout", self.phase_timeout, ", or null")
        if self.schedule.warmup_steps > (self.schedule.steps or self.steps):
            raise ConfigError(
                f"schedule.warmup_steps is {self.schedule.warmup_steps}, more than the "
                f"{self.schedule.steps or self.steps} steps of the {'schedule' if self.schedule.steps else 'run'}."
            )
        if self.model.path is None and self.tokenizer == TokenizerSettings():
            raise ConfigError(
                "A model from scratch brings no tokenizer. Set tokenizer.vocab_size to train one on the text, or "
                "tokenizer.path to a saved one."
            )
        if self.data.sequence_length % self.sharding.cp:
            raise ConfigError(
                f"data.sequence_length is {self.data.sequence_length}, which sharding.cp = {self.sharding.cp} "
                "does not divide."
            )

    @property
    def seconds_per_phase(self) -> float:
        """``phase_timeout``, or what stands for null there."""
        return max(self.step_timeout, _LEAST_PHASE) if self.phase_timeout is None else self.phase_timeout

    def check_ranks(self, world_size: int) -> None:
        """Whether the batch can be dealt out to ``world_size`` ranks.

        Raises:
            ConfigError: the degrees do not fit the world size, or the batch does not divide.
        """
        degrees = self.sharding.degrees(world_size)
        dp = degrees.dp_replicate * degrees.dp_shard
        if self.batch_size % (dp * self.accumulation):
            share = dp * self.accumulation
            fit = max(self.batch_size // share, 1) * share
            raise ConfigError(
                f"batch_size is {self.batch_size} sequences, which cannot be dealt out evenly to dp_replicate "
                f"({degrees.dp_replicate}) x dp_shard ({degrees.dp_shard}) x accumulation ({self.accumulation}) = "
                f"{share} micro-batches. Set batch_size to a multiple of {share}, for example {fit}."
            )

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
    if runs_code(config.sharding.plan) and not any(text.partition("=")[0] in _NAME_A_PLAN for text in overrides):
        plan = config.sharding.plan
        raise ConfigError(
            f"sharding.plan in {path} is {shown(plan)}, which names Python code. A config does not run code by itself: "
            f"read it, and if you trust it say so on the command line with sharding.plan={plan}. A plan that is saved "
            "as YAML needs no trust."
        )
    return config


def read_config(path: str | Path, overrides: Iterable[str] = ()) -> TrainConfig:
    """As :func:`load_config`, of a file that this program has written: it may name code."""
    data = apply_overrides(read_yaml(Path(path)), overrides)
    for section in ("model", "data"):
        if section not in data:
            raise ConfigError(f"{path} has no section {section!r}; examples/quickstart.yaml shows one.")
    return build(TrainConfig, data)


def _plain(value: Any) -> Any:
    """Tuples as lists, for YAML."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def _between(name: str, value: float, least: int, most: float = math.inf) -> None:
    """Both may be reached, infinity and NaN never."""
    if not (least <= value <= most and value < math.inf):
        limit = f"at least {least}" if value < least else f"at most {most:,}" if value < math.inf else "a finite number"
        raise ConfigError(f"{name} is {value}; it must be {limit}.")


def _positive(name: str, value: float, otherwise: str = "") -> None:
    if not 0 < value < math.inf:
        raise ConfigError(f"{name} is {value}; it must be a finite number above 0{otherwise}.")


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} is {shown(value)}; it must be one of {', '.join(allowed)}.")
