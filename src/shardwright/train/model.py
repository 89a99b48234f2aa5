"""The model of a run: its transformers config, checked, and the model itself, with the same weights at any mesh."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from shardwright.checkpoint.load import init_pretrained, init_whole, load_adapted, load_pretrained
from shardwright.distributed.models.build import load_config
from shardwright.distributed.models.config_json import check_values
from shardwright.errors import ConfigError, UnsupportedError
from shardwright.settings import unknown_key
from shardwright.train.config import TrainConfig
from shardwright.train.lora import lora_config, put_on_whole
from shardwright.train.sections import ModelSettings
from shardwright.untrusted import ToldAs, shown, usable_path

# Keys that transformers still takes although they are no fields of its configs any more.
_OLDER_KEYS = ("rope_theta", "rope_scaling", "torch_dtype")


def model_config(settings: ModelSettings, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """The transformers config that ``settings`` describe.

    A config given as a mapping takes its vocabulary size and special tokens from the tokenizer, where it leaves them
    out; its keys are checked, because transformers takes any key and ignores those it does not know.

    Raises:
        ConfigError: no such folder or file, an unknown model type or key, or values that do not go together.
        UnsupportedError: a model type that is no causal language model.
    """
    source = settings.path if settings.path is not None else settings.config
    config = _from_mapping(source, tokenizer) if isinstance(source, dict) else _from_files(Path(str(source)), settings)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedError(
            f"{config.model_type} is no causal language model in transformers; only those train here."
        )
    return config


def _from_files(path: Path, settings: ModelSettings) -> PreTrainedConfig:
    key = "model.path" if settings.path is not None else "model.config"
    path = usable_path(path, key, ConfigError)
    if not path.exists():
        raise ConfigError(f"There is no {path}, which {key} names (looked from {Path.cwd()}).")
    return load_config(path)


def _from_mapping(data: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    values = dict(data)
    check_values(values, "model.config")
    model_type = values.pop("model_type", None)
    if model_type not in CONFIG_MAPPING:
        near = get_close_matches(str(model_type), list(CONFIG_MAPPING), n=3)
        hint = f"Did you mean {' or '.join(near)}?" if near else "It is the model_type in a config.json, such as llama."
        raise ConfigError(f"model.config.model_type is {shown(model_type)}, which transformers does not know. {hint}")
    known = _known_keys(model_type)
    for key in values:
        if key not in known:
            raise ConfigError(unknown_key(f"model.config.{key}", str(key), known))
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    if "vocab_size" in known:
        special["vocab_size"] = len(tokenizer)
    with ToldAs(ConfigError, f"transformers refuses this {model_type} config"):
        return AutoConfig.for_model(model_type, **{**special, **values})


def _known_keys(model_type: str) -> set[str]:
    default = CONFIG_MAPPING[model_type]()
    return {*default.to_dict(), *default.attribute_map, *_OLDER_KEYS}


def check_fit(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, sequence_length: int) -> None:
    """Whether the model can take every token and every position it will be given.

    Raises:
        ConfigError: it cannot; the message has both sizes.
    """
    text = config.get_text_config().to_dict()
    vocabulary = text.get("vocab_size")
    if not isinstance(vocabulary, int) or len(tokenizer) > vocabulary:
        raise ConfigError(
            f"The tokenizer has {len(tokenizer):,} tokens, but the model's vocabulary is {shown(vocabulary)}. Use "
            "the tokenizer that belongs to the model, or (from scratch) leave vocab_size out of model.config."
        )
    positions = text.get("max_position_embeddings")
    if positions is not None and sequence_length > positions:
        raise ConfigError(
            f"data.sequence_length is {sequence_length}, but the model has {positions} positions "
            "(max_position_embeddings). Lower the one or raise the other."
        )


def build_model(config: TrainConfig, architecture: PreTrainedConfig, mesh: DeviceMesh) -> nn.Module:
    """The model of a run, sharded, in training mode; no rank ever holds more of it than its shards and one tensor.

    What is not in ``model.path`` follows from the run's seed and not from the mesh.
    """
    path, given = config.model.path, {"model_class": AutoModelForCausalLM, "dtype": getattr(torch, config.model.dtype)}
    made: nn.Module
    if path is None:
        return init_pretrained(architecture, config.sharding, mesh, seed=config.seed, **given)
    if config.lora.r:
        made = load_adapted(path, lora_config(config.lora), config.sharding, mesh, seed=config.seed, **given)
    else:
        made = load_pretrained(path, config.sharding, mesh, **given)
    return made.train()


def build_whole_model(config: TrainConfig, architecture: PreTrainedConfig) -> nn.Module:
    """The same model with the same weights in one piece, in CPU memory of this process."""
    dtype = getattr(torch, config.model.dtype)
    if config.model.path is None:
        return init_whole(architecture, seed=config.seed, model_class=AutoModelForCausalLM, dtype=dtype)
    model: Any = _load(config.model.path, dtype)
    if config.lora.r:
        model = put_on_whole(model, config.lora, config.seed)
    made: nn.Module = model.train()
    return made


def _load(path: str, dtype: torch.dtype) -> Any:
    settings = {"local_files_only": True, "trust_remote_code": False, "use_safetensors": True}
    loaded: Any
    with ToldAs(ConfigError, f"transformers cannot load the checkpoint in {path}"):
        loaded = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True, **settings)
    model, report = loaded
    if report["missing_keys"]:
        names = sorted(report["missing_keys"])
        raise ConfigError(
            f"The checkpoint in {path} lacks {len(names)} of the model's weights (first: {names[0]}); they would "
            "start at random. Use a whole checkpoint of this model type."
        )
    return model
