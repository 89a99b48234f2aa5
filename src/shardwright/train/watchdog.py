"""Ends a rank that stays in one phase of a run for too long, and says which, and where it waited.

Standard library only: it watches while torch is still being imported.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol, TypeVar

from shardwright.train.failure import leave_failure
from shardwright.train.rank_settings import RankSettings

HANGS = 70  # exit code of a rank that its watchdog has ended
NOTICE = 3.0  # seconds in which the ranks tell one another where they are
_T = TypeVar("_T")


@dataclass(frozen=True)
class Limit:
    """How long a phase may take.

    Attributes:
        seconds: that it may take.
        key: of the config, which sets it.
    """

    seconds: float
    key: str


@dataclass
class _Phase:
    name: str
    limit: Limit
    spent: float = 0.0  # seconds in which this process ran


class Peers(Protocol):
    """How the watchdogs of all ranks reach each other, once they have joined. Calls may block for ever."""

    @property
    def rank(self) -> int:
        """Of this process."""

    def asked(self) -> bool:
        """Whether some rank wants to know where the others are."""

    def ask(self) -> None:
        """Want to know it."""

    def tell(self, phase: str) -> None:
        """Say where this rank is."""

    def told(self) -> dict[int, str | None]:
        """Rank -> what it has said; None for nothing."""


class Watchdog:
    """Watches the main thread of a rank from another one, from :meth:`start` to the end of the process.

    Time in which the whole process was stopped (by SIGSTOP, or Ctrl-Z) does not count.

    Args:
        step: for a step.
        other: for every other phase.
        end: what ends the process.

    Attributes:
        peers: the other ranks, once they are known.
    """

    def __init__(self, step: Limit, other: Limit, end: Callable[[int], object] = os._exit) -> None:
        self.peers: Peers | None = None
        self._step, self._other = step, other
        self._main = threading.get_ident()
        self._end_process = end
        self._phase = _Phase("starting", other)
        self._ended = threading.Event()

    @classmethod
    def of(cls, settings: RankSettings) -> Watchdog:
        """With the limits that a training file sets."""
        step = Limit(settings.step_timeout, "step_timeout")
        return cls(step, Limit(settings.seconds_per_phase, "phase_timeout"))

    def begin(self, name: str, step: bool = False) -> None:
        """The phase called ``name`` (what the rank is doing, as in "building the model") begins; the last one ends."""
        self._phase = _Phase(name, self._step if step else self._other)

    @contextmanager
    def during(self, name: str) -> Iterator[None]:
        """A phase inside of another one, which then begins anew."""
        outer = self._phase
        self.begin(name)
        yield
        self._phase = _Phase(outer.name, outer.limit)

    def doing(self) -> str | None:
        """The phase that has begun last; None in a step."""
        phase = self._phase
        return None if phase.limit is self._step and self._step is not self._other else phase.name

    def start(self) -> None:
        """Watch until the process ends."""
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch inside the block only."""
        self.start()
        try:
            yield
        finally:
            self._ended.set()

    def _watch(self) -> None:
        last = time.monotonic()
        while True:
            phase = self._phase
            tick = min(phase.limit.seconds / 20, 1.0)
            if self._ended.wait(tick):
                return
            now = time.monotonic()
            phase.spent += min(now - last, 2 * tick)
            last = now
            if phase is self._phase and phase.spent > phase.limit.seconds:
                self._end(phase)
                return
            # From half of its time on, a rank answers one that has run out of it.
            if phase.spent > phase.limit.seconds / 2 and self.peers is not None:
                _answer(self.peers, phase.name)

    def _end(self, phase: _Phase) -> None:
        """Tell what is known where the launcher finds it, then end without waiting for anything."""
        stack = traceback.extract_stack(sys._current_frames()[self._main])
        text = (
            f"Rank {_rank(self.peers)} has been {phase.name} for more than {phase.limit.seconds:g} seconds "
            f"({phase.limit.key}), waiting in {_where(stack)}."
        )
        try:
            first, others = self._ask_around(phase.name)
            report(f"{text}{others}", stack, aloud=first)
        finally:
            self._end_process(HANGS)

    def _ask_around(self, here: str) -> tuple[bool, str]:
        """Whether this is the first of the ranks that have run out of time, and what is known of the others."""
        peers = self.peers
        if peers is None:
            return True, " The ranks had not met yet: look at those that did not start."
        within(NOTICE, peers.ask)
        _tell(peers, here)
        time.sleep(NOTICE)
        told = within(NOTICE, peers.told)
        if told is None:
            return True, " The store through which the ranks meet does not answer either: look at rank 0 first."
        silent = [rank for rank, phase in told.items() if phase is None]
        elsewhere = [f"rank {rank} is {phase}" for rank, phase in told.items() if phase not in (None, here)]
        found = f" Nothing was heard of rank(s) {', '.join(map(str, silent))}: look there first." if silent else ""
        found += f" Of the others, {', '.join(elsewhere[:5])}." if elsewhere else ""
        return peers.rank == min(rank for rank, phase in told.items() if phase is not None), found


def _answer(peers: Peers, here: str) -> None:
    if within(NOTICE, peers.asked):
        _tell(peers, here)


def _tell(peers: Peers, here: str) -> None:
    within(NOTICE, lambda: peers.tell(here))


def within(seconds: float, function: Callable[[], _T]) -> _T | None:
    """What ``function`` returns; None where it raises, or has not returned after so many seconds."""
    answers: list[_T] = []

    def run() -> None:
        with suppress(RuntimeError, OSError):  # what torch's stores raise
            answers.append(function())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else None


def report(text: str, stack: traceback.StackSummary, aloud: bool = True) -> None:
    """Leave ``text`` where torch's launcher looks for a rank's error, and (``aloud``) on standard error."""
    listing = "".join(traceback.format_list(stack))
    leave_failure(f"RunError: {text}", listing)
    if aloud:
        print(f"{listing}\nError: {text}", file=sys.stderr, flush=True)


def _rank(peers: Peers | None) -> str:
    return os.environ.get("RANK", "?") if peers is None else str(peers.rank)


def _where(stack: traceback.StackSummary) -> str:
    """The collective that the stack waits in, else its innermost frame; and which of our own lines called it."""
    inside = [frame.name for frame in stack if "/torch/distributed/" in frame.filename]
    public = [name for name in inside if not name.startswith("_") and name != "wrapper"]
    own = [frame for frame in stack if "/shardwright/" in frame.filename]
    called = f" (called in {'/'.join(own[-1].filename.split('/')[-2:])}, line {own[-1].lineno})" if own else ""
    if public:
        return f"torch.distributed's {public[-1]}{called}"
    last = stack[-1]
    return f"{last.name} ({last.filename}:{last.lineno}){'' if own and own[-1] is last else called}"
