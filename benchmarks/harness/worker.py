"""One rank of a contender: ``python -m harness.worker RANK WORLD_SIZE STORE BACKEND``, in the contender's interpreter.

Standard input is a socket: one JSON call per line comes in, one JSON line goes out. A call that raises ends the rank,
unless it says that the peer has no such thing; the other side finds the traceback in its log.
"""

from __future__ import annotations

import importlib
import json
import os
import queue
import sys
import threading
import traceback
from datetime import timedelta
from types import TracebackType
from typing import Any, NoReturn, TextIO

from harness.layouts import NotOfferedError


def main() -> NoReturn:
    rank, world_size, store, backend = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    asked, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(0), "w", buffering=1)
    sys.excepthook = _die
    if backend != "none":
        join(rank, world_size, store, backend)
    answers.write(json.dumps({"value": "ready"}) + "\n")
    calls: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_read, args=(asked, calls), daemon=True).start()
    while True:
        answers.write(json.dumps(answer_to(json.loads(calls.get()))) + "\n")


def answer_to(call: dict[str, Any]) -> dict[str, Any]:
    """What goes back for a call: ``value``, or ``not offered`` and why."""
    module, _, name = call["function"].partition(":")
    try:
        return {"value": vars(importlib.import_module(module))[name](**call["arguments"])}
    except NotOfferedError as error:  # by all ranks alike, before anything was done
        return {"not offered": str(error)}


def _read(asked: TextIO, calls: queue.Queue[str]) -> None:
    """Hand the calls on; end this rank, even in the middle of a collective, when the other side is gone."""
    for line in asked:
        calls.put(line)
    os._exit(0)


def _die(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Say what happened, and end at once: leaving in good order may wait for ranks that wait for this one."""
    os.write(2, "".join(traceback.format_exception(kind, error, trace)).encode())  # torch has replaced sys.stderr here
    os._exit(1)


def join(rank: int, world_size: int, store: str, backend: str) -> None:
    """Initialise torch.distributed; ``fake`` is torch's backend that sends nothing."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    torch.manual_seed(0)
    options: dict[str, Any] = {"rank": rank, "world_size": world_size, "timeout": timedelta(minutes=10)}
    if backend == "fake":
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", store=FakeStore(), **options)
    else:
        dist.init_process_group(backend, init_method=f"file://{store}", **options)


if __name__ == "__main__":
    main()
