"""Contenders: each library in ranks of its own, in its own environment, alive side by side.

While one contender computes, the others wait for their next call and use no processor: so runs can take turns.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

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


class Contender:
    """The ranks of one contender.

    >>> with Contender(OURS, world_size=2) as ours:
    ...     ours.call("collectives:count", layers=2)  # what each rank returned

    Args:
        backend: ``gloo``; ``fake`` (one process that plays rank 0 of ``world_size``); ``none`` (no process group).
        timeout: seconds that a call may take.
    """

    def __init__(self, peer: Peer, world_size: int = 1, backend: str = "gloo", timeout: float = 240.0) -> None:
        self.peer, self.world_size, self.backend, self.timeout = peer, world_size, backend, timeout
        self._folder = tempfile.TemporaryDirectory(prefix="contender-")
        self._ranks: list[subprocess.Popen[str]] = []
        self._starts = 0

    def start(self) -> None:
        """Start the ranks, without waiting for them; :meth:`call` does it where it was not done."""
        if not Path(self.peer.python).exists():
            raise ContenderError(f"{self.peer.title} is not installed: make bench-peers")
        self._starts += 1
        store = Path(self._folder.name) / f"store-{self._starts}"
        for rank in range(self.world_size if self.backend == "gloo" else 1):
            # What torchrun would set: some peers read it. One thread a rank, as torchrun does.
            environment = os.environ | {
                "OMP_NUM_THREADS": "1",
                "TOKENIZERS_PARALLELISM": "false",
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(self.world_size),
                "LOCAL_WORLD_SIZE": str(self.world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": "29500",
                "HF_HUB_OFFLINE": "1",
                "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            }
            numbers = [str(rank), str(self.world_size), str(store), self.backend]
            with open(self._log(rank), "w") as log:
                process = subprocess.Popen(
                    [self.peer.python, "-m", "harness.worker", *numbers],
                    cwd=BENCHMARKS,
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                )
            self._ranks.append(process)
        self._joined = False  # the first answer of each rank says that it has

    def call(self, function: str, **arguments: Any) -> list[Any]:
        """``module:function`` with ``arguments`` (JSON) on every rank at once; what each returned.

        Raises:
            ContenderError: one failed, or took longer than the time limit. The ranks are then stopped, and start anew
                with the next call.
        """
        if not self._ranks:
            self.start()
        if not self._joined:
            self._joined = True
            self._answers()
        line = json.dumps({"function": function, "arguments": arguments}) + "\n"
        for process in self._ranks:
            assert process.stdin is not None
            process.stdin.write(line)
            process.stdin.flush()
        return self._answers()

    def _answers(self) -> list[Any]:
        deadline = time.monotonic() + self.timeout
        waiting = {process.stdout: rank for rank, process in enumerate(self._ranks)}
        answers: dict[int, Any] = {}
        while waiting:
            ready, _, _ = select.select(list(waiting), [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                self._fail(f"no answer within {self.timeout:g} s")
            for stream in ready:
                assert stream is not None
                rank, line = waiting.pop(stream), stream.readline()
                if not line:
                    self._fail(self._last_words(rank))
                answers[rank] = json.loads(line)["value"]
        return [answers[rank] for rank in sorted(answers)]

    def _fail(self, reason: str) -> None:
        self.close()
        raise ContenderError(f"{self.peer.title}: {reason}")

    def _last_words(self, rank: int) -> str:
        """The last line of the traceback of a rank that died, or how it died."""
        code = self._ranks[rank].wait(10)
        lines = [line.strip() for line in self._log(rank).read_text().splitlines()]
        spoken = [line for line in lines if "Error" in line.split(":")[0] or "Exception" in line.split(":")[0]]
        return spoken[-1][:600] if spoken else f"rank {rank} ended with exit code {code}: {' '.join(lines[-2:])[:400]}"

    def _log(self, rank: int) -> Path:
        return Path(self._folder.name) / f"rank-{rank}.log"

    def close(self) -> None:
        """Stop the ranks."""
        for process in self._ranks:
            process.kill()
        for process in self._ranks:
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()
        self._ranks = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()
        self._folder.cleanup()
