"""Private names of transformers: every use that Shardwright makes of them is here (transformers 5.17 to 5.23)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = [
    "CALLS_OF_EXPERTS",
    "ExpertsCall",
    "attention_of",
    "call_of_experts",
    "conversions_of",
    "initialise_module",
    "kept_in_float32",
    "make_from_config",
    "names_missing_by_design",
    "names_not_saved",
    "one_document_in_each_row",
    "own_initialiser",
    "own_tp_plan",
    "recorded_modules",
    "set_attention",
    "set_conversions",
    "set_experts_implementation",
]


# Making models


def make_from_config(cls: type[PreTrainedModel], config: PreTrainedConfig, **kwargs: Any) -> PreTrainedModel:
    """A new model of a class that is no auto class."""
    return cls._from_config(config, **kwargs)


def kept_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> Iterable[str]:
    """Patterns of the parameters that stay in float32 when the model is made in ``dtype``."""
    return model._get_dtype_plan(dtype)


def own_initialiser(model: nn.Module) -> Callable[[nn.Module], None] | None:
    """What sets the weights of one module of ``model``; None for a model that is not transformers'."""
    return getattr(model, "_init_weights", None)


def initialise_module(model: PreTrainedModel, module: nn.Module) -> None:
    """Set the weights of ``module``, without those below it, as ``model`` does."""
    model._init_weights(module)


# What a model says of itself


def own_tp_plan(model: nn.Module | type[nn.Module]) -> dict[str, str]:
    """The tensor-parallel plan that the model, or its class, brings along: empty where it has none."""
    return getattr(model, "_tp_plan", None) or {}


def attention_of(config: PreTrainedConfig) -> str:
    """The attention implementation that was chosen; empty where none was."""
    return config._attn_implementation or ""


def set_attention(config: PreTrainedConfig, name: str) -> None:
    """Choose another one in this config alone; ``model.set_attn_implementation`` walks over all configs."""
    config._attn_implementation = name


def set_experts_implementation(config: PreTrainedConfig, name: str) -> None:
    """Choose how experts are computed; the model's own method passes over the towers of some models."""
    config._experts_implementation = name


@contextmanager
def one_document_in_each_row(masking_utils: Any) -> Iterator[None]:
    """Inside, the positions of tensors without values are taken for those of one document in each row.

    Otherwise transformers makes a mask for several documents, because it cannot look.

    Args:
        masking_utils: the module ``transformers.masking_utils``.
    """
    with patch.object(masking_utils, "find_packed_sequence_indices", lambda position_ids: None):
        yield


# Weights in files


def names_not_saved(model: PreTrainedModel) -> Iterable[str]:
    """The names that are left out when the model is saved."""
    return model._keys_to_ignore_on_save or ()


def names_missing_by_design(model: PreTrainedModel) -> Iterable[str]:
    """Patterns of the names that a folder of weights need not have."""
    return model._keys_to_ignore_on_load_missing or ()


def conversions_of(model: nn.Module) -> list[Any] | None:
    """How the names and shapes in the files were made those of the model; None where it was not loaded from files."""
    return vars(model).get("_weight_conversions")


def set_conversions(model: nn.Module, conversions: list[Any]) -> None:
    """Note how the weights were converted, where transformers looks for it when it saves the model."""
    vars(model)["_weight_conversions"] = conversions


# Experts


@dataclass(frozen=True)
class ExpertsCall:
    """How a module that holds experts is called.

    Attributes:
        kind: ``"routed"``: with tokens, the experts that each goes to, and their weights. ``"sorted"``: with rows in
            the order of their experts, and how many rows each expert has. ``"alike"``: with rows in the order of their
            experts, equally many for each.
        arguments: what its forward calls them.
    """

    kind: str
    arguments: tuple[str, ...]

    @property
    def routed(self) -> bool:
        return self.kind == "routed"


# Behind ``use_experts_implementation`` (65 classes in 5.23), and beside it; JetMoE's; Llama 4's.
CALLS_OF_EXPERTS = (
    ExpertsCall("routed", ("hidden_states", "top_k_index", "top_k_weights")),
    ExpertsCall("routed", ("hidden_states", "router_indices", "routing_weights")),
    ExpertsCall("sorted", ("inputs", "expert_size")),
    ExpertsCall("alike", ("hidden_states",)),
)


def call_of_experts(module: nn.Module) -> ExpertsCall | None:
    """How ``module`` would be called if it held experts; None where that is not known."""
    arguments = tuple(inspect.signature(module.forward).parameters)
    return next((call for call in CALLS_OF_EXPERTS if call.arguments == arguments), None)


# What a model hands out beside its results


def recorded_modules(model: nn.Module) -> list[str]:
    """The modules of ``model`` whose results transformers notes by hooks, to hand them out (routers)."""
    found: list[str] = []
    for owner, part in model.named_modules():
        specs = getattr(type(part), "_can_record_outputs", None)
        if not isinstance(specs, dict):
            continue
        prefix = f"{owner}." if owner else ""
        wanted = [spec for key, value in specs.items() if key != "hidden_states" for spec in _each(value)]
        for name, module in part.named_modules():
            if any(_is_recorded(spec, module, f"{prefix}{name}") for spec in wanted):
                found.append(f"{prefix}{name}")
    return list(dict.fromkeys(found))


def _each(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (tuple, list)) else [value]


def _is_recorded(spec: Any, module: nn.Module, name: str) -> bool:
    """``spec`` is a class, the end of a name, or an object with one of either."""
    cls = spec if isinstance(spec, type) else getattr(spec, "target_class", None)
    end = spec if isinstance(spec, str) else getattr(spec, "class_name", None)
    return (cls is not None and isinstance(module, cls)) or (end is not None and name.endswith(end))
