"""What a person sees of a run: a progress bar in a terminal, plain lines elsewhere. Rank 0 only."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from shardwright.train.metrics import Metrics
from shardwright.train.plot import curve

_PLAIN_LINES = 20


def describe(metrics: Metrics) -> str:
    """One line about a step."""
    parts = [
        f"loss {metrics.loss:.4f}",
        f"grad norm {metrics.grad_norm:.3f}",
        f"{metrics.memory_gib:.2f} GiB",
    ]
    if metrics.tokens_per_second is not None:
        parts.insert(2, f"{metrics.tokens_per_second:,.0f} tokens/s")
    if metrics.validation_loss is not None:
        parts.append(f"validation {metrics.validation_loss:.4f}")
    return " · ".join(parts)


class ProgressBar:
    """Shows the steps of a run as they are done; a context manager.

    In a terminal a bar with the latest numbers, and a line that stays for every validation. Elsewhere about twenty
    lines in all, and one for every validation.
    """

    def __init__(self, console: Console, steps: int) -> None:
        self._console = console
        self._steps = steps
        self._line_every = max(steps // _PLAIN_LINES, 1)
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeRemainingColumn(compact=True),  # the line has to fit 80 columns
                TextColumn("{task.description}"),
            )
            self._bar = Progress(*columns, console=console)
            self._task = self._bar.add_task("starting", total=steps)

    def show(self, metrics: Metrics) -> None:
        """The numbers of a step."""
        text = describe(metrics)
        if self._bar is not None:
            latest = describe(replace(metrics, validation_loss=None))
            self._bar.update(self._task, completed=metrics.step, description=latest)
        last = metrics.step == self._steps
        due = self._bar is None and (metrics.step == 1 or metrics.step % self._line_every == 0 or last)
        if due or metrics.validation_loss is not None:
            say(self._console, f"step {metrics.step:>{len(str(self._steps))}}/{self._steps}  {text}")

    def __enter__(self) -> ProgressBar:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


def say(console: Console, text: str, markup: bool = True) -> None:
    """Print ``text``: wrapped between words in a terminal, in one line elsewhere."""
    console.print(text, highlight=False, markup=markup, soft_wrap=not console.is_terminal)


class ConsoleHandler(logging.Handler):
    """Puts log messages above the progress bar, and nothing around them."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        say(self._console, record.getMessage(), markup=False)


def show_curve(console: Console, losses: Sequence[float]) -> None:
    """The loss over the steps, drawn in the terminal."""
    width = max(min(console.width - 16, 72), 8)
    console.print("\n[bold]Training loss[/]")
    for line in curve(losses, width=width, ascii_only=console.encoding.lower() not in ("utf-8", "utf8")):
        console.print(line, style="cyan", highlight=False, markup=False, no_wrap=True)
    console.print()
