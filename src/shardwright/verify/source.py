"""The model a user names: a folder, a file or a type, to a transformers config."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from shardwright.errors import ConfigError
from shardwright.verify.stages import Stage

# What the default config of a type lacks to describe a model that runs (at any size).
COMPLETED: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "nemotron": {"num_key_value_heads": 8},
    "reformer": {"is_decoder": True},
    "xmod": {"default_language": "en_XX"},
}


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
    with Stage(ConfigError, f"The default config of model type {name!r} is not valid by itself; pass a config.json"):
        return CONFIG_MAPPING[name](**COMPLETED.get(name, {}))


def _from_path(path: Path) -> PreTrainedConfig:
    if path.is_dir() and not (path / "config.json").is_file():
        raise ConfigError(f"There is no config.json in {path}.")
    with Stage(ConfigError, f"{path} is not a config that the installed transformers can load"):
        return AutoConfig.from_pretrained(path, local_files_only=True)
