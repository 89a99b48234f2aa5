"""PEFT's adapters on a model that is on meta, before it is sharded: names, and values to begin with.

The base model's tensors keep their places in files: their names are followed through what PEFT puts around its layers.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shardwright.checkpoint.initial import Initial
from shardwright.errors import ConfigError, UnsupportedError
from shardwright.untrusted import ToldAs

ADAPTER = "default"  # PEFT's name of the first adapter
_PARTS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")  # what LoRA draws, and what begins at zero


@dataclass(frozen=True)
class Adapters:
    """What is put on a model: PEFT's config, and what the first values are drawn from."""

    config: Any
    seed: int


def put_adapters(model: PreTrainedModel, adapters: Any) -> tuple[nn.Module, dict[str, str]]:
    """``model`` (on meta) with ``adapters``, a config of PEFT's, and: name of a tensor of the base model in it -> the
    name that it had.

    Raises:
        ConfigError: PEFT cannot put these adapters on this model.
    """
    from peft import get_peft_model

    before = {id(tensor): name for name, tensor in _tensors(model).items()}
    made: nn.Module
    with ToldAs(ConfigError, f"PEFT cannot put adapters on {type(model).__name__}"), torch.device("meta"):
        made = get_peft_model(model, adapters, autocast_adapter_dtype=False)
    return made, {name: before[id(tensor)] for name, tensor in _tensors(made).items() if id(tensor) in before}


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


class AdaptedInitialiser:
    """Initial values of a model with adapters: the base model's own, and PEFT's for LoRA, drawn from ``seed`` and the
    name of the layer.

    Args:
        skeleton: the whole model on meta, with adapters.
        names: as :func:`put_adapters` returns them.
        base: of the base model.
    """

    def __init__(self, skeleton: nn.Module, names: dict[str, str], base: Initial, seed: int = 0) -> None:
        self._modules = dict(skeleton.named_modules())
        self._names = names
        self._base = base
        self._seed = seed

    def value(self, name: str) -> Tensor:
        """The whole initial value of a parameter or buffer, on the CPU.

        Raises:
            UnsupportedError: it is of an adapter of another kind than LoRA.
        """
        if name in self._names:
            return self._base.value(self._names[name])
        path, inside = self._layer_of(name)
        layer: Any = self._modules[path]
        parts = [layer.get_submodule(key) for key in _PARTS]
        digest = hashlib.sha256(f"{self._seed}/{path}".encode()).digest()
        with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.device("cpu"):
            torch.default_generator.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            for part in parts:
                part.to_empty(device="cpu")
            layer.reset_lora_parameters(ADAPTER, True)
            made = dict(layer.named_parameters())[inside].detach()
        for part in parts:
            part.to_empty(device="meta")
        return made

    def _layer_of(self, name: str) -> tuple[str, str]:
        """The path of the layer of LoRA that holds the tensor, and the tensor's name in it."""
        from peft.tuners.lora import LoraLayer

        keys = name.split(".")
        for depth in range(len(keys) - 1, 0, -1):
            path = ".".join(keys[:depth])
            if isinstance(self._modules.get(path), LoraLayer) and keys[depth] in _PARTS:
                return path, ".".join(keys[depth:])
        raise UnsupportedError(
            f"{name} is of an adapter that has no values on the meta device; plain LoRA has. Load the base model with "
            "transformers, put the adapter on with PEFT's get_peft_model, and parallelize it last."
        )
