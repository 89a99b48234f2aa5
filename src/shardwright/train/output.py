"""The folder a run writes to: ``model/``, ``metrics.jsonl``, ``config.yaml`` and ``tensorboard/``."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from shardwright.errors import ConfigError
from shardwright.train.config import OutputSettings

MODEL = "model"
METRICS = "metrics.jsonl"
CONFIG = "config.yaml"
TENSORBOARD = "tensorboard"
CHECKPOINTS = "checkpoints"
_RESULTS = (MODEL, METRICS, CONFIG, TENSORBOARD, CHECKPOINTS)


def check_output(settings: OutputSettings, resume: bool = False) -> None:
    """Whether a run may write to ``settings.dir``; changes nothing.

    Args:
        resume: the run goes on with what an earlier one left there.

    Raises:
        ConfigError: it holds the results of an earlier run, or cannot be written to.
    """
    folder = Path(settings.dir)
    found = [name for name in _RESULTS if (folder / name).exists()]
    if found and not settings.overwrite and not resume:
        raise ConfigError(
            f"{folder} already holds the results of a run ({', '.join(found)}). Choose another output.dir, or replace "
            "them with output.overwrite=true, or go on from its checkpoints with checkpoint.resume=true."
        )
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ConfigError(f"output.dir is {folder}, but {existing} is not a folder that can be written to.")


def start_output(settings: OutputSettings, config_yaml: str, resumed: bool = False) -> Path:
    """Make the folder, without the results of an earlier run (unless this one goes on with them), and put the config
    in it. One rank calls this.
    """
    folder = Path(settings.dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output.dir is {folder}, which cannot be made: {error.strerror}.") from None
    if not resumed:
        shutil.rmtree(folder / TENSORBOARD, ignore_errors=True)
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    (folder / CONFIG).write_text(config_yaml, encoding="utf-8")
    return folder
