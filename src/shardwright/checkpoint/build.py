"""The model of a Hugging Face config on the meta device: shapes and dtypes, no memory."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from shardwright.errors import CheckpointError, ConfigError, UnsupportedError


def local_folder(path: str | Path) -> Path:
    """``path`` itself where it is a folder; otherwise the hub's copy of the repository of that name.

    Only safetensors, JSON and tokenizer files are fetched.

    Raises:
        CheckpointError: neither a folder nor a name of a repository that can be reached.
    """
    if Path(path).is_dir():
        return Path(path)
    if not isinstance(path, str) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path):
        raise CheckpointError(f"There is no folder {path}.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(path, allow_patterns=wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise CheckpointError(f"{path} is no folder here, and fetching it from the hub failed: {error}") from error


def read_config(folder: Path, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The transformers config in ``folder``.

    Raises:
        CheckpointError: none there, or none that this transformers understands.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"transformers cannot read the config in {folder}: {error}") from error
    if "quantization_config" in config.to_dict():
        raise UnsupportedError(
            f"The weights in {folder} are quantised ({config.to_dict()['quantization_config']}). Dequantise them with "
            "transformers first: sharded loading keeps every weight as it is in the file."
        )
    return config


def model_class_of(config: PreTrainedConfig) -> type[Any]:
    """The transformers class that ``config`` was saved with, or the causal language model of its type."""
    for name in config.architectures or ():
        found = vars(transformers).get(name) or getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    return AutoModelForCausalLM


def build_on_meta(
    config: PreTrainedConfig,
    model_class: type[Any] | None = None,
    dtype: torch.dtype | str | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """A model of random nothing: every parameter and buffer on meta, ties made, dtypes as transformers loads them.

    Args:
        config: not changed, but for the dtype that transformers notes in it.
        model_class: an Auto class or a model class; None takes the one ``config`` names.
        dtype: of the parameters; None takes the one ``config`` names, or float32.
        kwargs: for the model's class, for example ``attn_implementation``.

    Raises:
        ConfigError: the class does not take such a config.
    """
    wanted = dtype or config.dtype or torch.float32
    kept: torch.dtype = getattr(torch, wanted) if isinstance(wanted, str) else wanted
    cls = model_class or model_class_of(config)
    make = cls._from_config if issubclass(cls, PreTrainedModel) else cls.from_config
    try:
        with torch.device("meta"):
            model = make(config, dtype=kept, **kwargs)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{cls.__name__} cannot be made from a {config.model_type} config: {error}") from error
    _keep_in_float32(model, kept)
    return model


def _keep_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """What transformers keeps in float32 although ``dtype`` is less: routers, some norms."""
    patterns = [re.compile(pattern.replace("*", ".*")) for pattern in model._get_dtype_plan(dtype)]
    for path, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and any(pattern.search(f"{path}.{key}") for pattern in patterns):
                value = parameter.to(torch.float32)
                module._parameters[key] = nn.Parameter(value, requires_grad=parameter.requires_grad)
