"""What all commands have in common: an error is one paragraph, a signal ends in order, limits are told."""

from __future__ import annotations

import os
import resource
import signal
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from shardwright.errors import ConfigError, RunError, ShardwrightError, StoppedError, from_system
from shardwright.untrusted import printable

_SECONDS_FOR_RANK_0 = 3
_LEAST_FILES = 64
_LEAST_MEMORY = 2**30
_SECONDS_TO_UNWIND = 0.5
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class _SignalError(BaseException):
    """A signal that ends this process. No ``Exception``: what runs is not meant to catch it."""


class Commands(click.Group):
    """A group that turns every :class:`ShardwrightError` into one paragraph on stderr and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        with _listening() as received:
            try:
                _require_limits()
                return super().invoke(ctx)
            except ShardwrightError as error:
                told = error
            except (KeyboardInterrupt, _SignalError):
                told = StoppedError("Stopped by SIGINT.")
            except Exception as error:
                refused = from_system(error)
                if refused is None and not received:
                    raise
                told = refused or RunError(str(error))
        # Compiled code that is interrupted while it is imported raises errors of its own instead of the signal's.
        told = StoppedError(f"Stopped by {received[0]}.") if received else told
        tell(told)
        ctx.exit(told.exit_code)


def _require_limits() -> None:
    """Raises ConfigError where torch could not even be imported, or would end the process without a word."""
    for limit, least, what in (
        (resource.RLIMIT_NOFILE, _LEAST_FILES, "files open at once (ulimit -n)"),
        (resource.RLIMIT_AS, _LEAST_MEMORY, "bytes of address space (ulimit -v)"),
    ):
        allowed = resource.getrlimit(limit)[0]
        if allowed != resource.RLIM_INFINITY and allowed < least:
            raise ConfigError(
                f"This process may have {allowed:,} {what}; at least {least:,} are needed. Raise the limit."
            )


@contextmanager
def _listening() -> Iterator[list[str]]:
    """Inside, a signal that would end this process without a word, and leave its folders behind, is raised as an error.

    Not in a rank that another launcher has started: it may be told to end while it waits in compiled code. Signals that
    this process was started to ignore, as by nohup, stay ignored.

    Yields:
        names of the signals that have come.
    """
    received: list[str] = []
    unwinding: list[weakref.ref[_SignalError]] = []
    ended, sending = threading.Event(), threading.Lock()

    def stop(number: int, _: Any) -> None:
        if ended.is_set():
            return
        if not received:
            threading.Thread(target=again, args=(number,), daemon=True).start()
        received.append(signal.Signals(number).name)
        error = _SignalError()
        unwinding[:] = [weakref.ref(error)]
        try:
            raise error
        finally:
            del error  # the frame that its traceback holds would keep it alive

    def again(number: int) -> None:
        """Destructors, callbacks and compiled code may swallow what was raised in them: then it is gone."""
        while not ended.wait(_SECONDS_TO_UNWIND):
            with sending:
                if unwinding[0]() is None and not ended.is_set():
                    os.kill(os.getpid(), number)

    started = not {"RANK", "SLURM_STEP_NUM_TASKS"} & os.environ.keys()
    before = {number: signal.getsignal(number) for number in _SIGNALS} if started else {}
    heard = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
    for number in heard:
        signal.signal(number, stop)
    try:
        yield received
    finally:
        ended.set()
        with sending:  # no signal comes after the handlers that were here before are back
            for number, handler in heard.items():
                signal.signal(number, handler)


def tell(error: ShardwrightError) -> None:
    """Print the error, in one rank only: every rank has the same one."""
    from rich.console import Console
    from rich.text import Text

    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) != "0":
        time.sleep(_SECONDS_FOR_RANK_0)  # torchrun stops every rank when the first one ends
        return
    text = Text("Error: ", style="bold red").append(printable(str(error)), style="default")
    console = Console(stderr=True)
    console.print(text, soft_wrap=not console.is_terminal)
