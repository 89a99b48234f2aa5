"""Numbers of a run: what a line of metrics holds, and the files it goes to."""

from __future__ import annotations

import json
import resource
import sys
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from shardwright.errors import ConfigError


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


def _lines_until(file: Path, done: int) -> list[dict[str, Any]]:
    """The lines of the first ``done`` steps. A kill may have cut the last line short: it is not among them."""
    if not done or not file.is_file():
        return []
    whole = [line for line in file.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    return [line for line in map(json.loads, whole) if line["step"] <= done]


class MetricsFiles:
    """``metrics.jsonl`` and TensorBoard events in one folder; a context manager that closes both.

    Args:
        done: steps that a resumed run has behind it; their lines stay, later ones go.

    Attributes:
        losses: those of the lines that stayed.
    """

    def __init__(self, folder: Path, tensorboard: bool, done: int = 0) -> None:
        kept = _lines_until(folder / "metrics.jsonl", done)
        self.losses = [line["loss"] for line in kept]
        self._lines = (folder / "metrics.jsonl").open("w", encoding="utf-8", buffering=1)
        self._lines.writelines(json.dumps(line) + "\n" for line in kept)
        self._events = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1 if done else None)

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
