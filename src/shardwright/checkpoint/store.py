"""``CheckpointStore``: the checkpoints of one training run.

A checkpoint is a folder ``step-00000120`` with

- ``state/``: model and optimizer, written by torch.distributed.checkpoint, readable at any mesh;
- ``random-00003.safetensors``: the random states of rank 3;
- ``model/``: config and tokenizer, so that ``shardwright export`` needs nothing else;
- ``run.json``: step, data position, schedule, metric, mesh, versions;
- ``manifest.json``: size and checksum of every other file.

It is written under a name that begins with a dot and renamed when all of it is on the disk.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shardwright import __version__
from shardwright.checkpoint.atomic import abandon, begin, finish, recover, remove, unfinished
from shardwright.checkpoint.manifest import MANIFEST, Sums, sums_of, verify, write_manifest
from shardwright.checkpoint.pieces import Pieces
from shardwright.checkpoint.save import skeleton_of, write_description
from shardwright.checkpoint.state import RunState
from shardwright.checkpoint.storage import SafeReader, read_tensors, write_tensors
from shardwright.checkpoint.together import all_here, barrier, from_all, rank_and_world, same_error_everywhere
from shardwright.errors import CheckpointError

RUN = "run.json"
STATE = "state"
DESCRIPTION = "model"
_NAME = re.compile(r"step-\d{8}")


@dataclass(frozen=True)
class RunInfo:
    """What ``run.json`` says.

    Attributes:
        step: optimizer steps that have been taken.
        progress: the caller's own data (position in the data, losses, ...), JSON.
        metric: what the best checkpoint is chosen by, less is better; None: not measured.
        state: :meth:`shardwright.checkpoint.state.RunState.data`.
        world_size: ranks that wrote it.
        notes: the caller's description of the run (degrees, config), for people and for ``shardwright inspect``.
        versions: of torch, transformers and Shardwright.
        saved: when, in UTC.
    """

    step: int
    progress: dict[str, Any]
    metric: float | None
    state: dict[str, Any]
    world_size: int
    notes: dict[str, Any]
    versions: dict[str, str]
    saved: str


class CheckpointStore:
    """Saves checkpoints of a run into a folder, in the background, and keeps the last few and the best.

    Making one is a collective over all ranks.

    Args:
        root: the folder, on a disk that all ranks see.
        model: the transformers model that is trained (after it was sharded).
        tokenizer: saved with every checkpoint.
        keep_last: how many of the newest checkpoints stay; the best one (least metric) stays on top of them.
        timeout: seconds to wait for ranks that have not called :meth:`save` yet.
    """

    def __init__(
        self,
        root: Path,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        keep_last: int = 2,
        timeout: float = 600.0,
    ) -> None:
        self.root = root.absolute()
        self._skeleton = skeleton_of(model)
        self._tokenizer = tokenizer
        self._keep_last = keep_last
        self._timeout = timeout
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        # Collectives of the writing thread must not mix with those of the training step.
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._token = from_all(uuid4().hex)[0]  # tells its meetings from those of a run that was killed

    def save(
        self,
        state: RunState,
        step: int,
        progress: Mapping[str, Any],
        *,
        metric: float | None = None,
        notes: Mapping[str, Any] | None = None,
        wait: bool = False,
    ) -> None:
        """Save a checkpoint. This rank's state is copied to the CPU now; it is written while training goes on.

        Collective: every rank calls it. It waits for the save before it, if that is still being written.

        Raises:
            CheckpointError: the save before this one failed (or this one, with ``wait``); not all ranks came.
        """
        self.wait()
        all_here(f"checkpoint of step {step} in {self.root}", self._timeout, self._token)
        rank, world = rank_and_world()
        pieces = {name: Pieces(value, copy=True) for name, value in state.tensors().items()}
        info = RunInfo(
            step=step,
            progress=dict(progress),
            metric=metric,
            state=state.data(),
            world_size=world,
            notes=dict(notes or {}),
            versions={"torch": torch.__version__, "transformers": transformers.__version__, "shardwright": __version__},
            saved=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        self._pending = self._thread.submit(self._write, pieces, _random_states(), info, rank)
        if wait:
            self.wait()

    def wait(self) -> None:
        """Wait until the last save is on the disk.

        Raises:
            CheckpointError: it failed; the same on every rank. The checkpoints before it are untouched.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait for the last save and end the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def _write(self, pieces: dict[str, Pieces], random: dict[str, Tensor], info: RunInfo, rank: int) -> None:
        folder = self.root / f"step-{info.step:08d}"
        temporary = unfinished(folder)
        with self._agreed(folder):
            if rank == 0:
                begin(folder)
        try:
            with self._agreed(folder):
                (temporary / STATE).mkdir(exist_ok=True)
            write_tensors(pieces, temporary / STATE, self._group)
            with self._agreed(folder):
                mine = temporary / f"random-{rank:05d}.safetensors"
                save_file(random, mine)
                sums = sums_of(temporary, [mine, *(temporary / STATE).glob(f"__{rank}_*")])
            gathered: Sums = {}
            for part in from_all(sums, self._group):
                gathered |= part
            with self._agreed(folder):
                if rank == 0:
                    self._finish(folder, info, gathered)
        except CheckpointError:
            if rank == 0:
                abandon(folder)
            raise
        barrier(self._group)

    def _finish(self, folder: Path, info: RunInfo, sums: Sums) -> None:
        """The parts that rank 0 writes, then the name."""
        temporary = unfinished(folder)
        write_description(self._skeleton, self._tokenizer, temporary / DESCRIPTION)
        (temporary / RUN).write_text(json.dumps(asdict(info), indent=1), encoding="utf-8")
        rest = [path for path in temporary.rglob("*") if path.is_file()]
        rest = [path for path in rest if path.relative_to(temporary).as_posix() not in sums]
        write_manifest(temporary, sums | sums_of(temporary, rest))
        finish(folder)
        self._prune()

    def _prune(self) -> None:
        folders = list_checkpoints(self.root)
        infos = {folder: read_info(folder) for folder in folders}
        measured = [(info.metric, -info.step, folder) for folder, info in infos.items() if info.metric is not None]
        best = {min(measured)[2]} if measured else set()
        for folder in folders[: -self._keep_last]:
            if folder not in best:
                remove(folder)

    def _agreed(self, folder: Path) -> Any:
        return same_error_everywhere(f"Saving {folder}", self._group)


def _random_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def list_checkpoints(root: Path) -> list[Path]:
    """The whole checkpoints in ``root``, oldest first."""
    found = root.iterdir() if root.is_dir() else []
    return sorted(path for path in found if _NAME.fullmatch(path.name) and (path / MANIFEST).is_file())


def latest_checkpoint(root: Path) -> Path | None:
    """The newest whole checkpoint in ``root``; None when there is none. Collective: all ranks get rank 0's answer."""
    rank, _ = rank_and_world()
    answer = None
    with same_error_everywhere(f"Looking for checkpoints in {root}"):
        if rank == 0 and root.is_dir():
            recover(root)
            answer = next(reversed(list_checkpoints(root)), None)
    return from_all(answer)[0]


def read_info(folder: Path) -> RunInfo:
    """What ``run.json`` in ``folder`` says.

    Raises:
        CheckpointError: it cannot be read, or is of another format.
    """
    try:
        data = json.loads((folder / RUN).read_text(encoding="utf-8"))
        return RunInfo(**data)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder / RUN} cannot be read: {error}. Resume from another checkpoint.") from error


@torch.no_grad()
def load_checkpoint(folder: Path, state: RunState) -> RunInfo:
    """Put a checkpoint back into ``state``; its mesh may be another than the one that saved it.

    Collective: every rank calls it. All files are checked against their checksums first, each rank reading its share.
    Random states come back where the number of ranks is the same; the caller seeds them anew where it is not.

    Returns:
        What the checkpoint says about the run.

    Raises:
        CheckpointError: damaged, or of another model; on every rank alike.
    """
    folder = folder.absolute()
    rank, world = rank_and_world()
    with same_error_everywhere(f"Loading {folder}"):
        verify(folder, rank, world)
    with same_error_everywhere(f"Loading {folder}"):
        info = read_info(folder)
        reader = SafeReader(folder / STATE)
        state.prepare(reader.read_metadata())
    read_tensors(state.tensors(), reader)
    with same_error_everywhere(f"Loading {folder}"):
        state.restore(info.state)
        if info.world_size == world:
            states = load_file(folder / f"random-{rank:05d}.safetensors")
            torch.set_rng_state(states["cpu"])
            if "cuda" in states and torch.cuda.is_available():
                torch.cuda.set_rng_state(states["cuda"])
    return info
