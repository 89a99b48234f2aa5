"""From what a user calls a model (a folder, a file, a type) to its config, its class, and the model on meta.

Nothing is downloaded and no weight is read or allocated: a model of 405 billion parameters takes a few seconds.
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
)

from shardwright.errors import ConfigError

_CLASSES = (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
)
# What reading a config file, or making a model from sizes that do not go together, raises: any of these, by model.
_REFUSALS = (
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    IndexError,
    RuntimeError,
    AssertionError,
    ArithmeticError,
    ImportError,
    OSError,
    StrictDataclassError,
)


def load_config(model: str | os.PathLike[str] | PreTrainedConfig) -> PreTrainedConfig:
    """The config of a checkpoint folder, a ``config.json`` or a model type of transformers (its default config).

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
        raise ConfigError(_no_such_model(name))
    try:
        return CONFIG_MAPPING[name]()
    except _REFUSALS as error:
        raise ConfigError(
            f"The default config of model type {name!r} is not valid by itself ({_one_line(error)}). Pass a "
            "config.json instead."
        ) from error


def _no_such_model(name: str) -> str:
    if os.sep in name or name.endswith(".json"):
        return (
            f"There is no {name} (looked from {Path.cwd()}). Nothing is downloaded: for a model of the Hub, download "
            "its config.json first."
        )
    close = difflib.get_close_matches(name, list(CONFIG_MAPPING), n=3)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    return (
        f"{name!r} is no folder with a checkpoint, no config.json and no model type of the installed transformers "
        f"{transformers.__version__}.{hint}"
    )


def _from_path(path: Path) -> PreTrainedConfig:
    if path.is_dir() and not (path / "config.json").is_file():
        raise ConfigError(f"There is no config.json in the folder {path}, so it is no checkpoint.")
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except _REFUSALS as error:
        raise ConfigError(f"transformers cannot read the model config in {path}: {_one_line(error)}") from error


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that a config was saved with; else the one that transformers makes from it.

    Image-text-to-text models come before causal language models, those before encoder-decoders and bare models.

    Raises:
        ConfigError: transformers has none.
    """
    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    for mapping in _CLASSES:
        if type(config) in mapping:
            cls: Any = mapping[type(config)]
            return cls[0] if isinstance(cls, tuple) else cls
    raise ConfigError(
        f"The installed transformers {transformers.__version__} has no model for a {type(config).__name__} "
        f"(architectures: {config.architectures})."
    )


def build_on_meta(
    config: PreTrainedConfig, cls: type[PreTrainedModel] | None = None, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """The model of ``config`` on the meta device: names, shapes, dtypes and ties, no memory.

    Args:
        cls: a model class; None takes :func:`model_class`'s.
        dtype: of the parameters, but for those that transformers keeps in float32 (some routers and norms); None
            takes the one that ``config`` names, or float32.

    Raises:
        ConfigError: no model can be made from these values.
    """
    cls = cls or model_class(config)
    wanted: Any = dtype or config.dtype or torch.float32
    kept: torch.dtype = getattr(torch, wanted) if isinstance(wanted, str) else wanted
    try:
        with torch.device("meta"):
            model = cls._from_config(config, dtype=kept)
    except _REFUSALS as error:
        raise ConfigError(
            f"{cls.__name__} cannot be made from this {config.model_type} config: {_one_line(error)}"
        ) from error
    _keep_in_float32(model, kept)
    return model


def _keep_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    patterns = [re.compile(pattern.replace("*", ".*")) for pattern in model._get_dtype_plan(dtype)]
    for path, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and any(pattern.search(f"{path}.{key}") for pattern in patterns):
                value = parameter.to(torch.float32)
                module._parameters[key] = nn.Parameter(value, requires_grad=parameter.requires_grad)


def _one_line(error: BaseException) -> str:
    """The start of an error's message as one line, with its type where the message says little."""
    text = " ".join(str(error).split())
    text = text if len(text) <= 300 else f"{text[:300]} ..."
    return text if " " in text else f"{type(error).__name__}: {text}"
