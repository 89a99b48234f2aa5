"""Contenders: each library in ranks of its own, in its own environment, alive side by side.

While one contender computes, the others wait for their next call and use no processor: so runs can take turns.
"""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self, TextIO

from harness.nursery import Nursery

BENCHMARKS = Path(__file__).resolve().parents[1]
BUILD = BENCHMARKS.parent / "build" / "benchmarks"


class ContenderError(RuntimeError):
    """A contender raised, died or was too slow; the message is the last line that it said."""


@dataclass(frozen=True)
class Peer:
    """A contender by name.

    Attributes:
        name: of its file in ``harness/peers``.
        title: in the tables.
        environment: folder of its virtual environment below ``build/benchmarks``; empty for the interpreter that runs
            the benchmark.
    """

    name: str
    title: str
    environment: str = ""

    @property
    def python(self) -> str:
        return str(BUILD / self.environment / "bin" / "python") if self.environment else sys.executable


OURS = Peer("ours", "Shardwright")
HANDWRITTEN = Peer("handwritten", "hand-written torch")
TRANSFORMERS = Peer("huggingface", "transformers", "transformers")
AUTOMODEL = Peer("automodel", "Automodel", "automodel")
ACCELERATE = Peer("accelerated", "accelerate", "transformers")
PEERS = {peer.name: peer for peer in (OURS, HANDWRITTEN, TRANSFORMERS, AUTOMODEL, ACCELERATE)}


@contextmanager
def nurseries(peers: Iterable[Peer]) -> Iterator[dict[Peer, Nursery]]:
    """A nursery for each of ``peers`` that is installed."""
    with ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nurseries-")))
        installed = [peer for peer in peers if Path(peer.python).exists()]
        yield {
            peer: stack.enter_context(Nursery(peer.python, peer.name, logs / f"{peer.name}.log")) for peer in installed
        }


class _Rank:
    """The connection to a rank, and its process where it is a child of this one."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.process: subprocess.Popen[bytes] | None = None
        self._socket, self.theirs = socket.socketpair()
        self.answers: TextIO = self._socket.makefile("r")

    def send(self, line: str) -> None:
        self._socket.sendall(line.encode())

    def close(self) -> None:
        """End the rank: it ends itself when its connection closes."""
        self.answers.close()
        self._socket.close()
        if self.process is not None:
            self.process.kill()
            self.process.wait()


class Contender:
    """The ranks of one contender.

    >>> with Contender(OURS, world_size=2) as ours:
    ...     ours.call("collectives:count", layers=2)  # what each rank returned

    Args:
        backend: ``gloo``; ``fake`` (one process that plays rank 0 of ``world_size``); ``none`` (no process group).
        nursery: forks the ranks; without it each is a fresh interpreter.
        timeout: seconds that a call may take.
    """

    def __init__(
        self,
        peer: Peer,
        world_size: int = 1,
        backend: str = "gloo",
        nursery: Nursery | None = None,
        timeout: float = 240.0,
    ) -> None:
        self.peer, self.world_size, self.backend, self.timeout = peer, world_size, backend, timeout
        self.nursery = nursery
        self._folder = tempfile.TemporaryDirectory(prefix="contender-")
        self._ranks: list[_Rank] = []
        self._starts = 0

    def start(self) -> None:
        """Start the ranks, without waiting for them; :meth:`call` does it where it was not done."""
        if not Path(self.peer.python).exists():
            raise ContenderError(f"{self.peer.title} is not installed: make bench-peers")
        self._starts += 1
        self._ranks = [self._start(rank) for rank in range(self.world_size if self.backend == "gloo" else 1)]
        self._joined = False  # the first answer of each rank says that it has

    def _start(self, number: int) -> _Rank:
        # What torchrun would set: some peers read it. One thread a rank, as torchrun does.
        environment = {
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "RANK": str(number),
            "LOCAL_RANK": str(number),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "29500",
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        numbers = [str(number), str(self.world_size), f"{self._folder.name}/store-{self._starts}", self.backend]
        rank = _Rank(Path(self._folder.name) / f"rank-{number}.log")
        with rank.theirs, open(rank.log, "w") as log:
            if self.nursery is not None:
                self.nursery.fork(numbers, environment, rank.theirs, log.fileno())
            else:
                rank.process = subprocess.Popen(
                    [self.peer.python, "-m", "harness.worker", *numbers],
                    cwd=BENCHMARKS,
                    env=os.environ | environment,
                    stdin=rank.theirs,
                    stdout=log,
                    stderr=log,
                )
        return rank

    def call(self, function: str, **arguments: Any) -> list[Any]:
        """``module:function`` with ``arguments`` (JSON) on every rank at once; what each returned.

        Raises:
            ContenderError: the peer has no such thing; or a rank failed, or took longer than the time limit. After
                these the ranks are stopped, and start anew with the next call.
        """
        if not self._ranks:
            self.start()
        if not self._joined:
            self._joined = True
            self._answers()
        line = json.dumps({"function": function, "arguments": arguments}) + "\n"
        for rank in self._ranks:
            rank.send(line)
        answers = self._answers()
        if any("not offered" in answer for answer in answers):
            raise ContenderError(f"{self.peer.title}: {answers[0]['not offered']}")
        return [answer["value"] for answer in answers]

    def _answers(self) -> list[dict[str, Any]]:
        deadline = time.monotonic() + self.timeout
        waiting = {rank.answers: number for number, rank in enumerate(self._ranks)}
        answers: dict[int, Any] = {}
        while waiting:
            ready, _, _ = select.select(list(waiting), [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                self._fail(f"no answer within {self.timeout:g} s")
            for stream in ready:
                number, line = waiting.pop(stream), stream.readline()
                if not line:
                    self._fail(self._last_words(self._ranks[number]))
                answers[number] = json.loads(line)
        return [answers[number] for number in sorted(answers)]

    def _fail(self, reason: str) -> NoReturn:
        self.close()
        raise ContenderError(f"{self.peer.title}: {reason}")

    def _last_words(self, rank: _Rank) -> str:
        """The last line of the traceback of a rank that died, or how it died."""
        log = rank.log.read_text()
        if not log and self.nursery is not None:
            log = self.nursery.log.read_text()  # it may not have come to forking it
        lines = [line.strip() for line in log.splitlines()]
        spoken = [line for line in lines if "Error" in line.split(":")[0] or "Exception" in line.split(":")[0]]
        if spoken:
            return spoken[-1][:600]
        code = f" with exit code {rank.process.wait(10)}" if rank.process is not None else ""
        return f"a rank ended{code}: {' '.join(lines[-2:])[:400]}"

    def close(self) -> None:
        """Stop the ranks."""
        for rank in self._ranks:
            rank.close()
        self._ranks = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()
        self._folder.cleanup()
