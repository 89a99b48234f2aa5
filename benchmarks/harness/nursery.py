"""Nurseries: a process per contender that has its imports behind it, and forks ranks.

Importing torch, transformers and a peer takes a rank 5 to 15 s; forking one takes milliseconds. Where imports are not
what is measured, a comparison of six layouts pays for them once. The other side of a nursery is ``python -m
harness.nursery``, in the contender's interpreter.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

# What every step needs sooner or later.
PRELOADED = ("torch._dynamo", "torch.distributed.fsdp", "transformers.models.llama.modeling_llama")
LARGEST = 2**16  # bytes of a request: a rank's numbers and environment
PATIENCE = 30.0  # seconds that a nursery may take to end: it may be in the middle of its imports


class Nursery:
    """Starts the ranks of one contender. Its imports begin at once, and nobody waits for them.

    Args:
        python: the contender's interpreter.
        peer: name of the file in ``harness/peers``.
        log: what the nursery says, its traceback too.
    """

    def __init__(self, python: str, peer: str, log: Path) -> None:
        self.log = log
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        modules = [*PRELOADED, f"harness.peers.{peer}"]
        with theirs, open(log, "w") as output:
            self._process = subprocess.Popen(
                [python, "-m", "harness.nursery", str(theirs.fileno()), *modules],
                cwd=Path(__file__).resolve().parents[1],
                env=os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def fork(self, numbers: Sequence[str], environment: Mapping[str, str], connection: socket.socket, log: int) -> None:
        """Start a rank: its arguments as for :mod:`harness.worker`, its end of the connection, a file to talk to.

        A nursery that has died is noticed where the rank is read from: its connection is closed.
        """
        request = json.dumps({"numbers": list(numbers), "environment": dict(environment)}).encode()
        try:
            socket.send_fds(self._requests, [request], [connection.fileno(), log])
        except BrokenPipeError:
            return

    def close(self) -> None:
        """End the nursery and its ranks."""
        self._requests.close()
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()


def main() -> None:
    requests = socket.socket(fileno=int(sys.argv[1]))
    for module in sys.argv[2:]:
        importlib.import_module(module)
    gc.freeze()  # collections in the ranks leave the shared memory alone
    ranks: set[int] = set()
    while True:
        request, files, _, _ = socket.recv_fds(requests, LARGEST, 2)
        ranks = {rank for rank in ranks if os.waitpid(rank, os.WNOHANG)[0] == 0}
        if not request:
            break
        if (rank := os.fork()) == 0:
            requests.close()
            _become_rank(json.loads(request), *files)
        ranks.add(rank)
        for file in files:
            os.close(file)
    for rank in ranks:
        os.kill(rank, signal.SIGKILL)


def _become_rank(request: dict[str, Any], connection: int, log: int) -> NoReturn:
    """What a fresh interpreter would find: connection and log as its standard files, its environment and arguments."""
    from harness import worker

    for file, number in ((connection, 0), (log, 1), (log, 2)):
        os.dup2(file, number)
    os.environ.update(request["environment"])
    sys.argv = ["worker", *request["numbers"]]
    worker.main()


if __name__ == "__main__":
    main()
