"""PEFT's adapters on a model that is on meta, before it is sharded: names, and values to begin with.

The base model's tensors keep their places in files: their names are followed through what PEFT puts around its layers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
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

    before: dict[int, list[str]] = {}  # a tied tensor has several names
    for name, tensor in _tensors(model).items():
        before.setdefault(id(tensor), []).append(name)
    made: nn.Module
    with ToldAs(ConfigError, f"PEFT cannot put adapters on {type(model).__name__}"), torch.device("meta"):
        made = get_peft_model(model, adapters, autocast_adapter_dtype=False)
    names = {}
    for name, tensor in _tensors(made).items():
        if old := before.get(id(tensor)):
            names[name] = old.pop(0) if len(old) > 1 else old[0]  # PEFT leaves layers in their order
    return made, names


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


class AdaptedInitialiser:
    """Initial values of a model with adapters: the base model's own, and PEFT's for those of LoRA.

    What PEFT draws follows from ``seed`` and the name of the layer. DoRA's magnitudes are the norms of the base model's
    rows, since the update begins at zero; a module to save begins as a copy of the base model's.

    Args:
        skeleton: the whole model on meta, with adapters.
        names: as :func:`put_adapters` returns them.
        base: of the base model.
        loaded: the whole value of a parameter of the base model, by its name in ``skeleton``, once that has been read.
            Every rank asks for the same ones in the same order.

    Raises:
        UnsupportedError: there are adapters of another kind.
    """

    def __init__(
        self, skeleton: nn.Module, names: dict[str, str], base: Initial, loaded: Callable[[str], Tensor], seed: int = 0
    ) -> None:
        self._modules = dict(skeleton.named_modules())
        self._names = names
        self._base = base
        self._loaded = loaded
        self._seed = seed
        new = [name for name in _tensors(skeleton) if name not in names]
        self._makers = {name: self._maker(name) for name in new}

    def value(self, name: str) -> Tensor:
        """The whole initial value of a parameter or buffer, on the CPU."""
        return self._base.value(self._names[name]) if name in self._names else self._makers[name]()

    def _maker(self, name: str) -> Callable[[], Tensor]:
        """What makes the value of a tensor that PEFT has put on, by the layer that holds it."""
        from peft.tuners.lora import LoraLayer
        from peft.tuners.lora.dora import DoraLinearLayer
        from peft.utils.other import ModulesToSaveWrapper

        keys = name.split(".")
        for depth in range(len(keys) - 1, 0, -1):
            path, inside = ".".join(keys[:depth]), keys[depth:]
            layer: Any = self._modules.get(path)
            if isinstance(layer, LoraLayer) and inside[0] in _PARTS:
                return partial(self._drawn, path, ".".join(inside))
            if isinstance(layer, LoraLayer) and type(self._modules[".".join(keys[:-1])]) is DoraLinearLayer:
                return partial(self._magnitudes, path)
            if isinstance(layer, ModulesToSaveWrapper) and inside[:2] == ["modules_to_save", ADAPTER]:
                return partial(self._copy, ".".join([path, "original_module", *inside[2:]]))
        raise UnsupportedError(
            f"{name} is of an adapter that has no values on the meta device; LoRA, DoRA of linear layers and modules "
            "to save have. Load the base model with transformers, put the adapter on with PEFT's get_peft_model, and "
            "parallelize it last."
        )

    def _drawn(self, path: str, inside: str) -> Tensor:
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

    def _magnitudes(self, path: str) -> Tensor:
        layer: Any = self._modules[path]
        weight = self._loaded(f"{path}.base_layer.weight")
        made: Tensor = layer.lora_magnitude_vector[ADAPTER].get_weight_norm(
            weight, torch.zeros_like(weight), layer.scaling[ADAPTER]
        )
        return made.cpu()

    def _copy(self, name: str) -> Tensor:
        return self._loaded(name).cpu()
