"""Ranks on this machine: a pool of gloo workers that stays alive between calls.

Starting a rank the usual way costs five seconds of imports. Here one server process imports torch and transformers
once and every rank is a fork of it (multiprocessing's ``forkserver``), so a pool starts in well under a second and a
call costs what the function itself costs. Groups that a call makes stay until the ranks end: DTensor keeps meshes in
process-wide caches, and groups that come and go make it use meshes of the dead. Each has a thread of gloo's that wakes
a hundred times a second, so ranks that hold many are replaced by new ones between two calls.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import logging
import multiprocessing
import os
import pickle
import queue
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from shardwright._torch import groups_of_ranks
from shardwright.distributed.config import Degrees, ParallelConfig
from shardwright.distributed.mesh import make_mesh
from shardwright.errors import ConfigError, ShardwrightError
from shardwright.scratch import scratch_folder
from shardwright.verify import shared_gpu

PRELOADED = (
    "torch.distributed.tensor.parallel",
    "torch.distributed.fsdp",
    "torch.distributed._composable",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "shardwright.distributed.parallelizer",
    "shardwright.verify.ranks",
)
_BACKENDS = {"cpu": "cpu:gloo", "cuda": "cpu:gloo,cuda:nccl", shared_gpu.BACKEND: shared_gpu.BACKEND}
_GROUPS = 16  # that a rank may hold when the next call begins
_GRACE = 5.0  # seconds that the other ranks get to answer once one has failed
_NO_GUARD = 64  # exit code of a rank that was to start ranks while it imported the script that starts it


class RankError(ShardwrightError, RuntimeError):
    """A rank died, did not answer in time, or raised something that cannot be sent to this process."""


@dataclass
class _Worker:
    process: Any
    connection: Connection
    stacks: Path  # where the worker writes the stacks of its threads when it is asked for them
    groups: int = 1  # process groups that it held after its last call


class RankPool:
    """``world_size`` ranks on this machine, with torch.distributed initialised on each.

    >>> with RankPool(2) as pool:
    ...     pool.run(my_function, 1, 2)  # [my_function(1, 2) on rank 0, on rank 1]

    The ranks start with the first :meth:`run`, and anew when they hold many process groups: what a function leaves in
    its rank may not be there in the next call. As with all of Python's multiprocessing, a script that uses a pool
    keeps its own work under ``if __name__ == "__main__":``.

    Args:
        world_size: number of ranks.
        timeout: seconds that one :meth:`run` may take.
        kind: ``"cpu"`` (gloo); ``"cuda"`` (NCCL, a GPU for each rank); or ``"shared_gpu"`` (ranks that share the GPUs
            there are, see :mod:`shardwright.verify.shared_gpu`).

    Raises:
        ConfigError: no GPU, or for NCCL fewer than ranks.
    """

    def __init__(self, world_size: int, timeout: float = 120.0, kind: str = "cpu") -> None:
        if world_size < 1:
            raise ConfigError(f"A pool needs at least one rank, not {world_size}.")
        gpus = torch.cuda.device_count()
        if kind == "cuda" and gpus < world_size:
            raise ConfigError(f"{world_size} ranks need a GPU each, and this machine has {gpus}. Lower the degrees.")
        if kind == shared_gpu.BACKEND and not gpus:
            raise ConfigError("The ranks are to share this machine's GPUs, but torch finds no GPU. Use device cpu.")
        self.world_size = world_size
        self.kind = kind
        self.timeout = timeout
        self._workers: list[_Worker] = []
        self._scratch = contextlib.ExitStack()

    def run(self, function: Callable[..., Any], *args: Any, timeout: float | None = None) -> list[Any]:
        """Call ``function(*args)`` on every rank at once.

        Args:
            function: importable by name (defined at the top level of a module).
            args: the same for every rank; sent by pickle. The function learns its rank from ``dist.get_rank()``.
            timeout: seconds for this call, instead of the pool's.

        Returns:
            What each rank returned, by rank. Sent by pickle: return plain tensors, not DTensors.

        Raises:
            RankError: a rank died or was too slow. The pool starts anew with the next call.
            Exception: what the ranks raised where all raised the same, else what the first to fail raised; with that
                rank's traceback as a note.
        """
        task = pickle.dumps((sys.path, pickle.dumps((function, args))))
        if not self._workers:
            self._start()
        for worker in self._workers:
            # A worker that died between two calls is found out below, by its silence.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                worker.connection.send_bytes(task)
        try:
            answers = self._collect(self.timeout if timeout is None else timeout)
        finally:
            if any(worker.groups > _GROUPS for worker in self._workers):
                self.close()
        return [value for _, value in sorted(answers.items())]

    def close(self) -> None:
        """Stop the ranks; the next :meth:`run` would start them again."""
        for worker in self._workers:
            worker.connection.close()
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
            worker.process.close()
        self._workers = []
        self._scratch.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        # Where importing a library has looked for GPUs, a fork cannot use them.
        context: Any = multiprocessing.get_context("forkserver" if self.kind == "cpu" else "spawn")
        context.set_forkserver_preload(list(PRELOADED))
        folder = self._scratch.enter_context(scratch_folder())
        for rank in range(self.world_size):
            here, there = context.Pipe()
            stacks = folder / f"stacks-{rank}"
            args = (rank, self.world_size, self.kind, str(folder / "store"), str(stacks), there)
            process = context.Process(target=_serve, args=args, daemon=True, name=f"rank-{rank}")
            try:
                process.start()
            except RuntimeError as error:
                if "bootstrapping phase" in str(error):  # this process is such a rank itself; its parent tells it
                    os._exit(_NO_GUARD)
                raise
            there.close()
            self._workers.append(_Worker(process, here, stacks))

    def _collect(self, timeout: float) -> dict[int, Any]:
        """The answers by rank; raises what went wrong first, after the other ranks had their chance to answer."""
        waiting = {worker.connection: rank for rank, worker in enumerate(self._workers)}
        answers: dict[int, Any] = {}
        failures: dict[int, BaseException] = {}
        deadline = time.monotonic() + timeout
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                rank = waiting.pop(connection)  # type: ignore[call-overload]
                value, failure = self._answer(rank)
                if failure is None:
                    answers[rank] = value
                    continue
                failures[rank] = failure
                deadline = min(deadline, time.monotonic() + _GRACE)
        if not waiting and not failures:
            return answers
        alike = len({(type(failure), str(failure)) for failure in failures.values()}) == 1
        # Alike on every rank: the lowest tells it. Else one that died, or the first: others may only follow from it.
        died = [rank for rank in failures if self._workers[rank].process.exitcode is not None]
        first = min(failures, default=None) if alike else next(iter(died or failures), None)
        error = self._too_slow(sorted(waiting.values()), timeout) if first is None else failures[first]
        if waiting or answers or not alike or isinstance(error, RankError):
            self.close()  # some ranks are ahead of others: no telling what the next collective would meet
        raise error

    def _answer(self, rank: int) -> tuple[Any, BaseException | None]:
        worker = self._workers[rank]
        try:
            worker.groups, answer = pickle.loads(worker.connection.recv_bytes())
            return pickle.loads(answer)
        except (EOFError, ConnectionResetError):
            worker.process.join(_GRACE)
            if worker.process.exitcode == _NO_GUARD:
                return None, RankError(
                    "The ranks import the script that starts them, and it starts ranks again. Put what the script does "
                    'under `if __name__ == "__main__":`, as for all of Python\'s multiprocessing.'
                )
            error = RankError(f"Rank {rank} of {self.world_size} died (exit code {worker.process.exitcode}).")
            if worker.stacks.exists():  # it came as far as that
                error.add_note(worker.stacks.read_text())  # what a crash in compiled code leaves
            return None, error

    def _too_slow(self, ranks: list[int], timeout: float) -> RankError:
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._workers[rank].process.pid, signal.SIGUSR1)
        time.sleep(0.3)
        files = {rank: self._workers[rank].stacks for rank in ranks}
        stacks = "\n".join(f"rank {rank}:\n{file.read_text()}" for rank, file in files.items() if file.exists())
        error = RankError(f"Rank(s) {ranks} of {self.world_size} did not answer within {timeout:g} seconds.")
        error.add_note(stacks)
        return error


class _Outcome:
    """Holds what a block of code ends with: a value set by the block, or the error that left it."""

    value: Any = None
    error: BaseException | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> bool:
        self.error = error
        return True


def _serve(rank: int, world_size: int, kind: str, store: str, stacks: str, connection: Connection) -> None:
    """The life of one worker: join the process group, then answer calls until the other end of the pipe closes."""
    file = open(stacks, "w")  # noqa: SIM115 (open for life)
    faulthandler.enable(file)
    faulthandler.register(signal.SIGUSR1, file, all_threads=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then closes the pipe
    tasks: queue.Queue[bytes] = queue.Queue()
    threading.Thread(target=_read_tasks, args=(connection, tasks), daemon=True).start()
    torch.set_num_threads(1)
    for library in ("torch", "transformers"):  # N ranks would say everything N times, one over the other
        logging.getLogger(library).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    # The parent's own time limit comes first; this one only ends a worker that lost its parent in a strange way.
    limit = timedelta(hours=1)
    if kind != "cpu":
        torch.cuda.set_device(rank % torch.cuda.device_count())
        torch.backends.cudnn.allow_tf32 = False  # the only product that torch rounds unasked
    if kind == shared_gpu.BACKEND:
        shared_gpu.register()
    dist.init_process_group(
        _BACKENDS[kind],
        init_method=f"file://{store}",
        rank=rank,
        world_size=world_size,
        timeout=limit,
        device_id=torch.device("cuda", rank) if kind == "cuda" else None,
    )
    gc.freeze()  # what was imported stays
    while True:
        answer = _call(rank, tasks.get())
        connection.send_bytes(pickle.dumps((groups_of_ranks(), answer)))
        del answer
        gc.collect()
        gc.freeze()  # as most of what is left: collecting after the next call need not look at it again


def _read_tasks(connection: Connection, tasks: queue.Queue[bytes]) -> None:
    """Feed the worker; end it, even in the middle of a collective, when the parent is gone."""
    while True:
        try:
            tasks.put(connection.recv_bytes())
        except (EOFError, OSError):
            os._exit(1)


def _call(rank: int, task: bytes) -> bytes:
    """Run one task and pickle ``(value, error)``."""
    path, call = pickle.loads(task)
    sys.path[:] = path  # a test module's folder joins the path only when pytest comes to it
    torch.manual_seed(0)
    outcome, packed = _Outcome(), _Outcome()
    with outcome:
        function, args = pickle.loads(call)
        outcome.value = function(*args)
    with packed:
        packed.value = pickle.dumps((outcome.value, _portable(rank, outcome.error)))
    if packed.error is not None:
        packed.value = pickle.dumps((None, _portable(rank, packed.error)))
    return packed.value


def _portable(rank: int, error: BaseException | None) -> BaseException | None:
    """``error`` with its traceback as a note, in a form that survives a pickle."""
    if error is None:
        return None
    text = f"On rank {rank}:\n" + "".join(traceback.format_exception(error))
    copy = _Outcome()
    with copy:
        error.add_note(text)
        copy.value = pickle.loads(pickle.dumps(error))
    if isinstance(copy.value, type(error)):
        return error.with_traceback(None)
    plain = RankError(f"{type(error).__name__}: {error}")
    plain.add_note(text)
    return plain


def rank_device() -> torch.device:
    """What this rank of a pool computes on: its GPU where the ranks were started on GPUs, else the CPU."""
    on_gpu = "cuda" in str(dist.get_backend_config())
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def shared_mesh(config: ParallelConfig | Degrees) -> DeviceMesh:
    """The mesh for ``config`` in this process, made once per set of degrees.

    Call it with the same configs in the same order on every rank: making a mesh is a collective. Every mesh holds
    process groups, so code that runs many cases in one process shares them.
    """
    return _mesh_of(config.degrees(dist.get_world_size()) if isinstance(config, ParallelConfig) else config)


@cache
def _mesh_of(degrees: Degrees) -> DeviceMesh:
    return make_mesh(degrees, rank_device().type)
