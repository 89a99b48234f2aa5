"""Tiny models: built on CPU from a shrunk config, with weights and batches on which mistakes show."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
)

from shardwright.distributed.models.build import class_of_type
from shardwright.errors import ConfigError
from shardwright.verify.shrink import FIRST_FREE_ID, LAST_PLAIN_ID, shrink
from shardwright.verify.stages import ShrinkError, Stage

# In the order of preference. All take ``input_ids`` and ``labels`` and compute a loss.
_CLASSES = (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
)


def shrunk_config(config: PreTrainedConfig, tp: int = 2) -> PreTrainedConfig:
    """A tiny config of the same class and architecture.

    Raises:
        ShrinkError: the config class refuses the small sizes.
    """
    with Stage(ShrinkError, f"The config of model type {config.model_type!r} cannot be shrunk"):
        return type(config).from_dict(shrink(config.to_dict(), tp))


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The language model of a config: image-text-to-text, causal, sequence-to-sequence or masked, what there is first.

    Raises:
        ConfigError: transformers has none.
    """
    if found := class_of_type(config, _CLASSES):
        return found
    raise ConfigError(
        f"transformers has no language model for a {type(config).__name__} (image-text-to-text, causal, "
        "sequence-to-sequence or masked), and those are what verify can build. Pass a function that builds your model "
        "to shardwright.verify.verify instead."
    )


def build(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """The model of ``config`` in float32 on CPU, in training mode, its weights drawn from ``seed``."""
    torch.manual_seed(seed)
    model = model_class(config)._from_config(config, dtype=torch.float32)
    randomize(model, seed)
    return model.train()


def randomize(model: nn.Module, seed: int = 0) -> None:
    """Move every parameter away from special values (norms of one, biases of zero), keeping its scale.

    A norm weight of exactly one hides that it was applied twice, a bias of zero that it was added twice.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.numel():
                continue
            fan_in = parameter.shape[-1] if parameter.ndim == 3 else parameter[:1].numel()
            scale = 0.1 if parameter.ndim < 2 else fan_in**-0.5
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            parameter.add_(noise.to(parameter.dtype), alpha=scale)


def text_batch(
    index: int, start: int = 0, rows: int = 2, length: int = 16, arguments: tuple[str, ...] = ()
) -> dict[str, torch.Tensor]:
    """Random ids and labels, int64 ``[rows, length]``, different for every ``start + index``.

    Args:
        arguments: names of ``TEXT_ARGUMENTS`` that the model takes, too.
    """
    generator = torch.Generator().manual_seed(start + index)
    ids = torch.randint(FIRST_FREE_ID, LAST_PLAIN_ID, (rows, length), generator=generator)
    batch = {"input_ids": ids, "labels": ids.clone()}
    return batch | {name: TEXT_ARGUMENTS[name](ids, generator) for name in arguments}


def text_pair_batch(index: int, start: int = 0, arguments: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
    """A :func:`text_batch` for encoder and decoder, whose ids are the labels moved on by one."""
    batch = text_batch(index, start, arguments=arguments)
    return {**batch, "decoder_input_ids": batch["labels"].roll(1, dims=1)}


def _boxes(ids: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Where on its page each token stands: left, top, right, bottom, from 0 to 1."""
    corners = torch.rand(*ids.shape, 2, 2, generator=generator)
    return corners.sort(dim=-2).values.flatten(-2)


# What else a forward may ask for where there is text alone, by name, made from the ids.
TEXT_ARGUMENTS: dict[str, Callable[[torch.Tensor, torch.Generator], torch.Tensor]] = {
    "mm_token_type_ids": lambda ids, generator: torch.zeros_like(ids),
    "bbox": _boxes,
}


def text_batches(config: PreTrainedConfig, start: int = 0) -> Callable[[int], dict[str, torch.Tensor]]:
    """Batches of text for the language model of ``config``."""
    accepted = inspect.signature(model_class(config).forward).parameters
    arguments = tuple(name for name in TEXT_ARGUMENTS if name in accepted)
    make = text_pair_batch if config.is_encoder_decoder else text_batch
    return partial(make, start=start, arguments=arguments)
