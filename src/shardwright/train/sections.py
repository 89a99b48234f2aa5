"""The sections of a training file, as plain data. Importing this imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from shardwright.distributed.precision import DTYPES
from shardwright.errors import ConfigError
from shardwright.untrusted import shown

MOST_TOKENS = 2**27  # of one sequence, or of a vocabulary
# Format of the data -> names of the files taken from a folder.
INCLUDED = {
    "text": ("*.txt", "*.md", "*.jsonl", "*.parquet"),
    "chat": ("*.jsonl", "*.parquet"),
    "prompt_completion": ("*.jsonl", "*.parquet"),
}


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
        one_of("dtype", self.dtype, DTYPES)


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
        if self.vocab_size is not None and not 257 <= self.vocab_size <= MOST_TOKENS:
            raise ConfigError(
                f"vocab_size is {self.vocab_size}; 256 bytes and an end-of-text token need at least 257, and "
                f"{MOST_TOKENS:,} are the most."
            )


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters (Hu et al. 2021) by PEFT: they are trained, and the model in ``model.path`` stays as it is.

    Attributes:
        r: their rank; 0: no adapters, all weights are trained.
        alpha: the update is scaled by ``alpha / r``, or by ``alpha / sqrt(r)`` where ``rank_stabilised``.
        dropout: of the adapters' input.
        target_modules: names of the linear layers that are adapted; ``all-linear``: every one but the head.
        rank_stabilised: rsLoRA (Kalajdzievski 2023).
        dora: DoRA (Liu et al. 2024): the size of each row of a weight is trained apart from its direction.
        modules_to_save: names of modules that are trained in whole, and saved with the adapters.
        target_parameters: names of parameters of packed experts that are adapted, such as
            ``mlp.experts.gate_up_proj``. Tensor and expert parallelism refuse them.
    """

    r: int = 0
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ("all-linear",)
    rank_stabilised: bool = False
    dora: bool = False
    modules_to_save: tuple[str, ...] = ()
    target_parameters: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        between("r", self.r, 0, 2**16)
        positive("alpha", self.alpha)
        between("dropout", self.dropout, 0, 1)
        if not self.target_modules:
            raise ConfigError("target_modules is empty; name the layers to adapt, or all-linear.")


@dataclass(frozen=True)
class DataSettings:
    """The examples and how they become sequences.

    Attributes:
        paths: files, folders or globs, and folders that ``datasets`` has written (``save_to_disk``). A ``.jsonl`` or
            ``.parquet`` file has one example in each line or row. Any other file is one text, in the format text only.
            ``stdlib:`` at the start stands for the folder of the running Python's standard library.
        include: file names (globs) taken from a folder; empty: those of the format.
        exclude: globs over whole paths that are left out.
        format: ``"text"``: every token is trained on. ``"chat"``: conversations under ``messages_key``, lists of
            messages with ``role`` and ``content``, written by the tokenizer's chat template. ``"prompt_completion"``:
            two texts, or two lists of messages, under ``prompt_key`` and ``completion_key``.
        text_key: the column that holds the text.
        messages_key: the column that holds the conversation.
        tools_key: the column that holds the tools that a conversation may call, where there is one.
        prompt_key: the column of what the model is given.
        completion_key: the column of what it should answer.
        chat_template: a file with a Jinja chat template, in place of the tokenizer's own. It is saved with the model.
        loss_on: ``"answers"``: the tokens of the assistant's turns, which the template marks with
            ``{% generation %}``, and those of the completion. ``"all"``: every token.
        too_long: what is done with an example of more than ``sequence_length + 1`` tokens, in the formats chat and
            prompt_completion: ``"truncate"`` leaves out its end, ``"drop"`` the example, ``"raise"`` is an error.
        sequence_length: tokens the model sees at once.
        pack: use every position. In the format text, texts are put one after the other (an end-of-text token between
            them) and cut at ``sequence_length``. In the others, several whole examples share a sequence; none sees
            another, and the positions of each begin at 0. False: every text or example starts a sequence of its own,
            padded at the end; the padding is not trained on.
        validation: sequences held out to measure the loss on, and never trained on.
        validation_paths: what to measure the loss on in place of held-out sequences; as ``paths``.
    """

    paths: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    format: str = "text"
    text_key: str = "text"
    messages_key: str = "messages"
    tools_key: str = "tools"
    prompt_key: str = "prompt"
    completion_key: str = "completion"
    chat_template: str | None = None
    loss_on: str = "answers"
    too_long: str = "truncate"
    sequence_length: int = 1024
    pack: bool = True
    validation: int = 0
    validation_paths: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.paths:
            raise ConfigError("paths is empty; name the files, folders or globs to train on.")
        one_of("format", self.format, tuple(INCLUDED))
        one_of("loss_on", self.loss_on, ("answers", "all"))
        one_of("too_long", self.too_long, ("truncate", "drop", "raise"))
        between("sequence_length", self.sequence_length, 2, MOST_TOKENS)
        between("validation", self.validation, 0)
        if self.validation and self.validation_paths:
            raise ConfigError("give validation (sequences held out) or validation_paths (files), not both.")
        if self.chat_template is not None and self.format == "text":
            raise ConfigError("chat_template is for the formats chat and prompt_completion; format is text.")

    @property
    def included(self) -> tuple[str, ...]:
        """``include``, or the files of the format."""
        return self.include or INCLUDED[self.format]

    @property
    def validates(self) -> bool:
        """Whether there is something to measure the loss on."""
        return bool(self.validation or self.validation_paths)


@dataclass(frozen=True)
class OptimizerSettings:
    """The optimizer. Weight decay acts on matrices only, not on norms and biases.

    Attributes:
        name: a class of ``torch.optim``, such as ``adamw`` (Loshchilov and Hutter 2019), ``sgd`` or ``muon``; or the
            dotted path of another, which only the command line may name, since it runs code.
        lr: the full learning rate.
        betas: of the Adam family.
        eps: of the Adam family and its like.
        weight_decay: where the optimizer has one.
        options: further arguments, such as ``{fused: true}`` or ``{momentum: 0.9}``.
    """

    name: str = "adamw"
    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas is {shown(list(self.betas))}; it must be two numbers in [0, 1).")
        positive("lr", self.lr)
        for name in ("eps", "weight_decay"):
            between(name, getattr(self, name), 0)
        if taken := sorted({*self.options} & {"name", "lr", "betas", "eps", "weight_decay", "params"}):
            raise ConfigError(f"options has {taken[0]}, which is a key of its own beside it.")

    @property
    def runs_code(self) -> bool:
        """Whether ``name`` is a path outside of torch, whose module is imported."""
        return "." in self.name and not self.name.startswith("torch.optim.")


@dataclass(frozen=True)
class ScheduleSettings:
    """The learning rate over the run: linear warm-up, then half a cosine, or what ``name`` says.

    Attributes:
        name: a schedule of transformers (``linear``, ``cosine``, ``cosine_with_min_lr``, ``constant``,
            ``constant_with_warmup``, ``warmup_stable_decay``, ``polynomial``, ``inverse_sqrt``, ...); null:
            Shardwright's own, which begins above 0 and ends at ``final_fraction``.
        options: further arguments of that schedule, such as ``{num_decay_steps: 100}``.
        warmup_steps: steps until ``optimizer.lr`` is reached.
        final_fraction: the share of ``optimizer.lr`` that is left at the last step, and after it; of Shardwright's own.
        steps: how many steps that is; null: the ``steps`` of the run. A run that is resumed keeps those it began with,
            so that more ``steps`` do not make the rate jump, unless they are set here.
    """

    name: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    warmup_steps: int = 0
    final_fraction: float = 0.1
    steps: int | None = None

    def __post_init__(self) -> None:
        between("warmup_steps", self.warmup_steps, 0)
        if self.steps is not None:
            between("steps", self.steps, 1)
        if not 0 <= self.final_fraction <= 1:
            raise ConfigError(f"final_fraction is {self.final_fraction}; it must be between 0 and 1.")
        if self.name is None and self.options:
            raise ConfigError("options are arguments of a schedule of transformers; set name to one.")
        if self.name is not None and self.final_fraction != ScheduleSettings.final_fraction:
            raise ConfigError(
                f"final_fraction is of the schedule without a name; {shown(self.name)} takes its own arguments in "
                "options."
            )


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
        between("log_every", self.log_every, 1)
        between("validate_every", self.validate_every, 0)


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
        between("every", self.every, 0)
        between("keep", self.keep, 1)


def between(name: str, value: float, least: int, most: float = math.inf) -> None:
    """Both may be reached, infinity and NaN never."""
    if not (least <= value <= most and value < math.inf):
        limit = f"at least {least}" if value < least else f"at most {most:,}" if value < math.inf else "a finite number"
        raise ConfigError(f"{name} is {value}; it must be {limit}.")


def positive(name: str, value: float, otherwise: str = "") -> None:
    if not 0 < value < math.inf:
        raise ConfigError(f"{name} is {value}; it must be a finite number above 0{otherwise}.")


def one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} is {shown(value)}; it must be one of {', '.join(allowed)}.")
