"""The model a user names: a folder, a file or a type, to a transformers config."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from shardwright.errors import ConfigError


def load_config(model: str | os.PathLike[str] | PreTrainedConfig) -> PreTrainedConfig:
    """The config of a checkpoint folder, a ``config.json`` or a model type; nothing is downloaded.

    Raises:
        ConfigError: ``model`` is none of these, or its config does not load.
    """
    if isinstance(model, PreTrainedConfig):
        return model
    path = Path(model)
    if path.exists():
        return _from_path(path)
    name = str(model)
    if name not in CONFIG_MAPPING:
        close = difflib.get_close_matches(name, list(CONFIG_MAPPING), n=3)
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        raise ConfigError(
            f"{name!r} is no folder with a checkpoint, no config.json and no model type of the installed "
            f"transformers.{hint} Nothing is downloaded: to verify a model of the Hub, download its config.json first."
        )
    try:
        return CONFIG_MAPPING[name]()
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"The default config of model type {name!r} is not valid by itself ({error}). Pass a config.json instead."
        ) from error


def _from_path(path: Path) -> PreTrainedConfig:
    if path.is_dir() and not (path / "config.json").is_file():
        raise ConfigError(f"There is no config.json in {path}.")
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not a config that the installed transformers can load: {error}") from error
