"""The folder a run writes to: ``model/``, ``metrics.jsonl``, ``config.yaml`` and ``tensorboard/``.

One run at a time has it. What is in it and was not written by a run stays; so do the results of an earlier run until
there are new ones.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shardwright.checkpoint.atomic import require_replaceable, write_text
from shardwright.checkpoint.run_info import find_checkpoint
from shardwright.errors import ConfigError
from shardwright.lock import Lock
from shardwright.train.sections import OutputSettings
from shardwright.untrusted import usable_path

MODEL = "model"
METRICS = "metrics.jsonl"
CONFIG = "config.yaml"
TENSORBOARD = "tensorboard"
CHECKPOINTS = "checkpoints"
_LOCK = ".lock"
_RESULTS = (MODEL, METRICS, CONFIG, TENSORBOARD, CHECKPOINTS)
_HEADER = "# Written by shardwright train.\n"
EVENTS = ".shardwright"  # the end of the names of our TensorBoard files
# What every saved model has; the names of a tokenizer's files are known when they are written.
_MODEL_FILES = (
    *("config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json"),
    *("adapter_config.json", "adapter_model.safetensors"),
)


def check_output(settings: OutputSettings, resume: bool | str = False) -> None:
    """Whether a run may write to ``settings.dir``; changes nothing.

    Args:
        resume: as in the config: whether the run goes on from the newest checkpoint there, or from which it does.

    Raises:
        ConfigError: it holds the results of an earlier run, files that are not a run's would be replaced, another run
            is writing there, or it cannot be written to.
        CheckpointError: there is no checkpoint to go on from; the model could not be saved in the end.
    """
    folder = usable_path(settings.dir, "output.dir", ConfigError)
    if isinstance(resume, str):
        find_checkpoint(usable_path(resume, "checkpoint.resume", ConfigError))
    found = [name for name in _RESULTS if os.path.lexists(folder / name)]
    if found and not settings.overwrite and not resume:
        raise ConfigError(
            f"{folder} already holds the results of a run ({', '.join(found)}). Choose another output.dir, or replace "
            "them with output.overwrite=true, or go on from its checkpoints with checkpoint.resume=true."
        )
    existing = next(parent for parent in (folder, *folder.absolute().parents) if os.path.lexists(parent))
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ConfigError(f"output.dir is {folder}, but {existing} is not a folder that can be written to.")
    for name in (CONFIG, METRICS):
        _require_ours(folder / name)
    require_replaceable(folder / MODEL, overwrite=True, names=_MODEL_FILES)
    if (folder / _LOCK).exists():
        with _locked(folder):
            pass


def _require_ours(file: Path) -> None:
    """Raises ConfigError for a file that has the name of one of ours, and was not written by a run."""
    if not os.path.lexists(file):
        return
    begins = b""
    if file.is_file():
        with file.open("rb") as opened:
            begins = opened.read(len(_HEADER))
    ours = _HEADER.encode() if file.name == CONFIG else b'{"step": '
    if begins and not begins.startswith(ours):
        raise ConfigError(
            f"{file} was not written by shardwright train, which would replace it. Choose another output.dir, or move "
            "the file."
        )


@contextmanager
def output_folder(settings: OutputSettings) -> Iterator[Path]:
    """The folder, made where it is not there, for this run alone. One rank calls this.

    A folder that was made here and that nothing was written to is removed again.

    Raises:
        ConfigError: it cannot be made, or another run has it.
    """
    folder = usable_path(settings.dir, "output.dir", ConfigError)
    made = [parent for parent in (folder, *folder.absolute().parents) if not parent.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output.dir is {folder}, which cannot be made: {error.strerror}.") from None
    try:
        with _locked(folder):
            yield folder
    finally:
        for parent in made:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = Lock(folder.resolve() / _LOCK)
    try:
        taken = lock.take()
    except OSError as error:
        raise ConfigError(f"output.dir is {folder}, which cannot be written to: {error.strerror}.") from None
    if not taken:
        raise ConfigError(
            f"Another run is writing to {folder} ({lock.holder()}). Wait for it, end it, or choose another output.dir."
        )
    try:
        yield
    finally:
        lock.release()


def start_output(settings: OutputSettings, config_yaml: str, resumed: bool) -> Path:
    """Put the config into the folder, and remove an earlier run's TensorBoard events where this one does not go on with
    them. One rank calls this, inside :func:`output_folder`.

    Raises:
        OSError: it cannot be written.
    """
    folder = usable_path(settings.dir, "output.dir", ConfigError)
    for events in (folder / TENSORBOARD).glob(f"*{EVENTS}") if not resumed else ():
        events.unlink()
    write_text(folder / CONFIG, _HEADER + config_yaml)
    return folder
