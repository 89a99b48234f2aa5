"""Adapters of a run: PEFT's config, and the adapted model in one piece."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from shardwright.checkpoint.adapted import AdaptedInitialiser, put_adapters
from shardwright.checkpoint.initial import Initialiser
from shardwright.distributed.models.build import build_on_meta
from shardwright.errors import ConfigError
from shardwright.train.sections import LoraSettings

_ALL = "all-linear"


def lora_config(settings: LoraSettings) -> Any:
    """``settings`` as PEFT's ``LoraConfig``.

    Raises:
        ConfigError: PEFT is not installed.
    """
    if find_spec("peft") is None:
        raise ConfigError("lora needs the package peft: pip install 'shardwright[peft]'.")
    from peft import LoraConfig

    targets = list(settings.target_modules)
    return LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        target_modules=_ALL if targets == [_ALL] else targets,
        use_rslora=settings.rank_stabilised,
        use_dora=settings.dora,
        modules_to_save=list(settings.modules_to_save) or None,
        target_parameters=list(settings.target_parameters) or None,
        task_type="CAUSAL_LM",
    )


def check_adapters(settings: LoraSettings, config: PreTrainedConfig) -> None:
    """Put the adapters on a model without weights.

    Raises:
        ConfigError: PEFT cannot, as where there are no layers of these names.
        UnsupportedError: adapters whose first values are not known without the weights.
    """
    base = build_on_meta(config, AutoModelForCausalLM)
    skeleton, names = put_adapters(build_on_meta(config, AutoModelForCausalLM), lora_config(settings))
    AdaptedInitialiser(skeleton, names, Initialiser(base), skeleton.get_parameter)


@torch.no_grad()
def put_on_whole(model: PreTrainedModel, settings: LoraSettings, seed: int) -> Any:
    """``model``, unsharded, with the adapters that a sharded one gets."""
    from peft import get_peft_model

    base = build_on_meta(model.config, AutoModelForCausalLM)
    skeleton, names = put_adapters(build_on_meta(model.config, AutoModelForCausalLM), lora_config(settings))
    made: Any = get_peft_model(model, lora_config(settings), autocast_adapter_dtype=False)
    initial = AdaptedInitialiser(skeleton, names, Initialiser(base), made.get_parameter, seed)
    for name, parameter in made.named_parameters():
        if name not in names:
            parameter.copy_(initial.value(name))
    return made
