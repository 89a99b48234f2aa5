"""Numbers of a run: what a line of metrics holds, and the files it goes to."""

from __future__ import annotations

import itertools
import json
import logging
import math
import resource
import shutil
import sys
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from shardwright.checkpoint.atomic import write_text
from shardwright.errors import ConfigError, RunError
from shardwright.train.output import EVENTS, METRICS, TENSORBOARD
from shardwright.untrusted import parse_json

log = logging.getLogger(__name__)

_LINE = 2**16  # characters of a line of metrics; those that are written have a few hundred


@dataclass(frozen=True)
class Metrics:
    """One line of ``metrics.jsonl``.

    Attributes:
        step: from 1.
        loss: mean over the targets of the global batch, in nats.
        grad_norm: global norm of the gradients, before clipping.
        lr: the learning rate of this step.
        tokens_per_second: over all ranks, since the line before; None for a first step that was also checked.
        memory_gib: largest memory of this rank so far: the GPU's, or the process's on a CPU.
        tokens: read since the start, over all ranks.
        validation_loss: on the held-out sequences, where it was measured.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    tokens_per_second: float | None
    memory_gib: float
    tokens: int
    validation_loss: float | None = None


def peak_memory_gib(device: torch.device) -> float:
    """The most memory this rank has used so far: allocated on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def use_tensorboard(wanted: bool | None) -> bool:
    """Whether TensorBoard events are written: where wanted, or (None) where the package is installed.

    Raises:
        ConfigError: wanted and not installed.
    """
    installed = find_spec("tensorboard") is not None
    if wanted and not installed:
        raise ConfigError(
            "output.tensorboard is true, but the package tensorboard is not installed. Install it with "
            "pip install 'shardwright[tensorboard]', or set output.tensorboard to null."
        )
    return installed if wanted is None else wanted


def _free_name(path: Path) -> Path:
    names = (path.with_name(f"{path.name}{number or ''}") for number in itertools.count())
    return next(name for name in names if not name.exists())


def _read_lines(file: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines of a metrics file, and how many others are in it.

    A kill may have cut the last line short: that is no damage.
    """
    if not file.is_file():
        return [], 0
    lines: list[dict[str, Any]] = []
    damaged = 0
    with file.open(encoding="utf-8", errors="replace") as opened:
        while text := opened.readline(_LINE):
            line = _as_line(text)
            if line is not None:
                lines.append(line)
            elif text.endswith("\n") or len(text) == _LINE:
                damaged += 1
    return lines, damaged


def _as_line(text: str) -> dict[str, Any] | None:
    try:
        line = parse_json(text, METRICS, RunError)
    except RunError:
        return None
    if not isinstance(line, dict) or type(line.get("step")) is not int or type(line.get("loss")) not in (int, float):
        return None
    return line if math.isfinite(line["loss"]) else None


class MetricsFiles:
    """``metrics.jsonl`` and TensorBoard events in one folder; a context manager that closes both.

    What is there is read, what stays of it is written beside and takes its place: a kill at any moment leaves the old
    lines or those that stay. A file with damaged lines is kept under another name.

    Args:
        done: steps that a resumed run has behind it; their lines stay, later ones go.

    Attributes:
        losses: those of the lines that stayed.

    Raises:
        OSError: they cannot be written.
    """

    def __init__(self, folder: Path, tensorboard: bool, done: int = 0) -> None:
        file = folder / METRICS
        lines, damaged = _read_lines(file) if done else ([], 0)
        if damaged:
            aside = _free_name(file.with_name(f"{METRICS}.damaged"))
            shutil.copyfile(file, aside)
            log.warning("%d lines of %s are damaged and left out; %s has them as they were.", damaged, file, aside)
        kept = [line for line in lines if line["step"] <= done]
        self.losses = [line["loss"] for line in kept]
        write_text(file, "".join(json.dumps(line) + "\n" for line in kept))
        self._lines = file.open("a", encoding="utf-8", buffering=1)
        self._events = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            purge = done + 1 if done else None
            self._events = SummaryWriter(str(folder / TENSORBOARD), purge_step=purge, filename_suffix=EVENTS)

    def write(self, metrics: Metrics) -> None:
        values = {key: value for key, value in asdict(metrics).items() if value is not None}
        self._lines.write(json.dumps(values) + "\n")
        if self._events is not None:
            for key, value in values.items():
                self._events.add_scalar(key, value, metrics.step)

    def __enter__(self) -> MetricsFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()
        if self._events is not None:
            self._events.close()
