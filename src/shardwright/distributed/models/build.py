"""From what a user calls a model (a folder, a file, a type) to its config, its class, and the model on meta.

Nothing is downloaded and no weight is read or allocated: a model of 405 billion parameters takes a few seconds.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping
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


def load_config(
    model: str | os.PathLike[str] | PreTrainedConfig,
    completed: Mapping[str, Mapping[str, Any]] | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedConfig:
    """The config of a checkpoint folder, a ``config.json`` or a model type of transformers (its default config).

    Args:
        completed: values for the default configs of model types that need some.
        trust_remote_code: run the code of a config class that comes with the folder.

    Raises:
        ConfigError: ``model`` is none of these, or its config does not load.
    """
    if isinstance(model, PreTrainedConfig):
        return model
    path = Path(model)
    if path.exists():
        return _from_path(path, trust_remote_code)
    name = str(model)
    if name not in CONFIG_MAPPING:
        raise ConfigError(_no_such_model(name))
    try:
        return CONFIG_MAPPING[name](**(completed or {}).get(name, {}))
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


def _from_path(path: Path, trust_remote_code: bool) -> PreTrainedConfig:
    if path.is_dir() and not (path / "config.json").is_file():
        raise ConfigError(f"There is no config.json in the folder {path}, so it is no checkpoint.")
    try:
        values, _ = PreTrainedConfig.get_config_dict(path, local_files_only=True)
        if "auto_map" in values and values.get("model_type") not in CONFIG_MAPPING and not trust_remote_code:
            raise ConfigError(
                f"{values.get('model_type')!r}, the type of the model in {path}, is not in the installed transformers "
                f"{transformers.__version__}; its code comes with the folder. Read it; if you trust it, use "
                "load_pretrained(..., trust_remote_code=True)."
            )
        return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=trust_remote_code)
    except ConfigError:
        raise
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
    if found := class_of_type(config, _CLASSES):
        return found
    raise ConfigError(
        f"The installed transformers {transformers.__version__} has no model for a {type(config).__name__} "
        f"(architectures: {config.architectures})."
    )


def class_of_type(config: PreTrainedConfig, mappings: Iterable[Any]) -> type[PreTrainedModel] | None:
    """The model class for configs of this type in the first of transformers' ``mappings`` that has one."""
    for mapping in mappings:
        if type(config) in mapping:
            found: Any = mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    return None


def build_on_meta(
    config: PreTrainedConfig,
    cls: type[Any] | None = None,
    dtype: torch.dtype | str | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """The model of ``config`` on the meta device: names, shapes, dtypes and ties, no memory.

    Args:
        config: not changed, but for the dtype that transformers notes in it.
        cls: a model class or one of transformers' Auto classes; None takes :func:`model_class`'s.
        dtype: of the parameters, but for those that transformers keeps in float32 (some routers and norms); None
            takes the one that ``config`` names, or float32.
        kwargs: for the model's class, for example ``attn_implementation``.

    Raises:
        ConfigError: no model can be made from these values.
    """
    chosen: Any = cls or model_class(config)
    wanted: Any = dtype or config.dtype or torch.float32
    kept: torch.dtype = getattr(torch, wanted) if isinstance(wanted, str) else wanted
    make = chosen._from_config if issubclass(chosen, PreTrainedModel) else chosen.from_config
    try:
        with torch.device("meta"):
            model = make(config, dtype=kept, **kwargs)
    except _REFUSALS as error:
        raise ConfigError(
            f"{chosen.__name__} cannot be made from this {config.model_type} config: {_one_line(error)}"
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
