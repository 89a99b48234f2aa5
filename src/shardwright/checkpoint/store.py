"""``CheckpointStore``: the checkpoints of one training run, folders as :mod:`.run_info` describes them."""

from __future__ import annotations

import itertools
import json
import logging
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from shardwright import __version__
from shardwright.checkpoint.adapters import describe_adapters, has_adapters
from shardwright.checkpoint.atomic import FolderWriter, recover_all, remove, unfinished
from shardwright.checkpoint.manifest import Sums, sums_of, verify, write_manifest
from shardwright.checkpoint.pieces import Pieces
from shardwright.checkpoint.run_info import (
    DESCRIPTION,
    NAME,
    RUN,
    SET_ASIDE,
    STATE,
    RunInfo,
    list_checkpoints,
    read_info,
)
from shardwright.checkpoint.save import skeleton_of, write_description
from shardwright.checkpoint.state import RunState
from shardwright.checkpoint.storage import SafeReader, read_tensors, write_tensors
from shardwright.checkpoint.together import all_here, barrier, from_all, rank_and_world, same_error_everywhere
from shardwright.errors import CheckpointError
from shardwright.untrusted import ToldAs, read_file

log = logging.getLogger(__name__)

_OURS = re.compile(f"{NAME.pattern}|{SET_ASIDE.pattern}")
_RANDOM_BYTES = 2**20  # of a file of random states; those of a CPU and a GPU have 5 KB


class CheckpointStore:
    """Saves checkpoints of a run into a folder, in the background, and keeps the last few and the best.

    Making one is a collective over all ranks.

    Args:
        root: the folder, on a disk that all ranks see.
        model: the transformers model that is trained (after it was sharded), or PEFT's around it.
        tokenizer: saved with every checkpoint.
        keep_last: how many of the newest checkpoints stay; the best one (least metric) stays on top of them.
        timeout: seconds to wait for ranks that have not called :meth:`save` yet.
    """

    def __init__(
        self,
        root: Path,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        keep_last: int = 2,
        timeout: float = 600.0,
    ) -> None:
        self.root = root.absolute()
        self._describe = partial(describe_adapters, model)
        if not has_adapters(model):
            self._describe = partial(write_description, skeleton_of(model))
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
        with ExitStack() as stack:
            writer = None
            with self._agreed(folder):
                if rank == 0:
                    writer = stack.enter_context(FolderWriter(folder, overwrite=True))
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
                if writer is not None:
                    self._finish(writer, info, gathered)
        barrier(self._group)

    def _finish(self, writer: FolderWriter, info: RunInfo, sums: Sums) -> None:
        """The parts that rank 0 writes, then the name."""
        self._describe(self._tokenizer, writer.path / DESCRIPTION)
        (writer.path / RUN).write_text(json.dumps(asdict(info), indent=1), encoding="utf-8")
        write_manifest(writer.path, sums)
        writer.finish()
        remove_set_aside(self.root)
        self._prune()

    def _prune(self) -> None:
        folders = list_checkpoints(self.root)
        measured = [(info.metric, -info.step, folder) for folder, info in _infos(folders) if info.metric is not None]
        best = {min(measured)[2]} if measured else set()
        for folder in folders[: -self._keep_last]:
            if folder not in best:
                remove(folder)

    def _agreed(self, folder: Path) -> Any:
        return same_error_everywhere(f"Saving {folder}", self._group)


def _infos(folders: list[Path]) -> Iterator[tuple[Path, RunInfo]]:
    """Of those that can be read; one that is damaged keeps no new one from being saved."""
    for folder in folders:
        try:
            yield folder, read_info(folder)
        except CheckpointError as error:
            log.warning("%s", error)


def _random_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_aside(root: Path, after: int) -> list[Path]:
    """Take the checkpoints in ``root`` of later steps than ``after`` out of the way of a run that does not go on from
    them: they keep their content and get a name that begins with a dot. Returns their new places.
    """
    moved = []
    for folder in list_checkpoints(root):
        if int(folder.name.removeprefix("step-")) > after:
            names = (folder.with_name(f".{folder.name}.replaced{number or ''}") for number in itertools.count())
            place = next(name for name in names if not name.exists())
            moved.append(folder.rename(place))
    return moved


def remove_set_aside(root: Path) -> None:
    """Remove what :func:`set_aside` has put away, since a new checkpoint is whole."""
    for path in sorted(root.iterdir()):
        if SET_ASIDE.fullmatch(path.name):
            remove(path)


def latest_checkpoint(root: Path) -> Path | None:
    """The newest whole checkpoint in ``root``; None when there is none. Collective: all ranks get rank 0's answer."""
    rank, _ = rank_and_world()
    answer = None
    with same_error_everywhere(f"Looking for checkpoints in {root}"):
        if rank == 0 and root.is_dir():
            recover_all(root, _OURS)
            answer = next(reversed(list_checkpoints(root)), None)
    return from_all(answer)[0]


def _restore_random_states(file: Path) -> None:
    with ToldAs(CheckpointError, f"{file} is damaged"):
        states = load(read_file(file, CheckpointError, _RANDOM_BYTES))
        here = _random_states()
        for device in here.keys() & states.keys():
            if states[device].dtype is not torch.uint8 or states[device].shape != here[device].shape:
                raise CheckpointError(f"{file} has {tuple(states[device].shape)} {states[device].dtype} for {device}.")
        torch.set_rng_state(states["cpu"])
        if "cuda" in here and "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"])


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
        verify(folder, rank, world, exactly=True)
    with same_error_everywhere(f"Loading {folder}"):
        info = read_info(folder)
        reader = SafeReader(folder / STATE)
        state.prepare(reader.read_metadata())
    read_tensors(state.tensors(), reader)
    with same_error_everywhere(f"Loading {folder}"):
        state.restore(info.state)
        if info.world_size == world:
            _restore_random_states(folder / f"random-{rank:05d}.safetensors")
    return info
