"""A sign of life in a terminal, where something takes long. Standard library only: importing torch is the first to."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EVERY = 3.0  # seconds


@contextmanager
def pulse(doing: Callable[[], str | None], first: bool = True) -> Iterator[None]:
    """Inside, print every few seconds what goes on, and for how long it has, if standard output is a terminal.

    Args:
        doing: says what goes on, as in "building the model"; None: nothing that needs to be told.
        first: whether this is the process that prints, of several.
    """
    if not (first and sys.stdout.isatty()):
        yield
        return
    ended = threading.Event()
    thread = threading.Thread(target=_print, args=(doing, ended), name="pulse", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _print(doing: Callable[[], str | None], ended: threading.Event) -> None:
    before, since, told = doing(), time.monotonic(), 0.0
    while not ended.wait(0.2):
        now, what = time.monotonic(), doing()
        if what != before:
            before, since, told = what, now, 0.0
        if what is not None and now - since >= told + EVERY:
            told = now - since
            print(f"  ... {what}, {told:.0f} s", flush=True)
