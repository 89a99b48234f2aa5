"""Inputs to run a model with: made from its config, from what the user gave, or guessed from its first layer."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shardwright.distributed.models.huggingface import pretrained
from shardwright.distributed.replay.runs import Inputs

# Neither is a likely head count, so that a dim's size tells what it is.
BATCH, LENGTH = 3, 7


def candidate_inputs(model: nn.Module, example_inputs: Any = None) -> Iterator[Inputs]:
    """Inputs to try, the likeliest first.

    Args:
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments (on any device, meta too).
    """
    if example_inputs is not None:
        yield _from_example(example_inputs, _rows(model))
    elif (found := pretrained(model)) is None:
        yield from _guesses(model)
    else:
        name, inner = found
        known = list(_from_config(inner))
        yield from known
        if name:  # what wraps it may want something else
            yield from _guesses(model)
            yield from (replace(inputs, called=name) for inputs in known)


def _normal(*shape: int) -> Tensor:
    """The same numbers at every call; the caller's random state is left alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def _ids(rows: int, least: int = 0) -> Tensor:
    """Ids below ``rows``, as :func:`_normal`."""
    return torch.randint(least, rows, (BATCH, LENGTH), generator=torch.Generator().manual_seed(3))


def _rows(model: nn.Module) -> int:
    """The number of ids that every table of the model has."""
    return min((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), default=2)


def _from_example(example: Any, rows: int) -> Inputs:
    if isinstance(example, Mapping):
        return Inputs((), {key: _concrete(value, rows) for key, value in example.items()})
    args = tuple(example) if isinstance(example, (tuple, list)) else (example,)
    return Inputs(tuple(_concrete(value, rows) for value in args))


def _concrete(value: Any, rows: int) -> Any:
    if not isinstance(value, Tensor):
        return value
    generator = torch.Generator().manual_seed(3)
    if value.is_floating_point():
        real = torch.randn(value.shape, generator=generator) if value.is_meta else value.detach().cpu().float()
        return real
    if value.is_meta:
        high = 2 if value.dtype == torch.bool else rows
        return torch.randint(high, value.shape, generator=generator).to(value.dtype)
    return value.detach().cpu()


def _from_config(model: PreTrainedModel) -> Iterator[Inputs]:
    config = model.config
    text = config.get_text_config(decoder=True)
    accepted = inspect.signature(model.forward).parameters
    fixed: dict[str, Any] = {"use_cache": False} if "use_cache" in accepted else {}
    rows = getattr(text, "vocab_size", None)
    ids = _ids(rows or 8, min(4, (rows or 8) - 1))
    if "decoder_input_ids" in accepted and config.is_encoder_decoder:
        fixed["decoder_input_ids"] = ids[:, :-2]
    name = model.main_input_name
    if name == "input_ids" or "input_ids" in accepted:
        yield Inputs((), {"input_ids": ids, **fixed})
    if "pixel_values" in accepted:
        vision = getattr(config, "vision_config", config)
        side, channels = getattr(vision, "image_size", 224), getattr(vision, "num_channels", 3)
        height, width = side if isinstance(side, (tuple, list)) else (side, side)
        images = {"pixel_values": _normal(BATCH, channels, height, width)}
        if "input_ids" in accepted:
            yield Inputs((), {"input_ids": ids, **images, **fixed})
        if name == "pixel_values":
            yield Inputs((), {**images, **fixed})
    if name == "input_features":
        bins = getattr(config, "num_mel_bins", 80)
        frames = 2 * getattr(config, "max_source_positions", 50)
        yield Inputs((), {name: _normal(2, bins, frames), **fixed})
        yield Inputs((), {name: _normal(2, 50, bins), **fixed})
    if name == "input_values":
        yield Inputs((), {name: _normal(2, 8000), **fixed})
    if "inputs_embeds" in accepted and hasattr(text, "hidden_size"):
        yield Inputs((), {"inputs_embeds": _normal(BATCH, LENGTH, text.hidden_size), **fixed})


def _guesses(model: nn.Module) -> Iterator[Inputs]:
    """From the first layer that has weights: ids for a table, features for a linear layer, an image for a kernel."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            yield Inputs((_ids(_rows(model)),))
        elif isinstance(module, nn.Linear):
            yield Inputs((_normal(BATCH, LENGTH, module.in_features),))
            yield Inputs((_normal(BATCH, module.in_features),))
        elif isinstance(module, nn.Conv2d):
            for side in (224, 32, 28, 64, 96, 128, 256, 384, 448, 512):
                yield Inputs((_normal(2, module.in_channels, side, side),))
        elif isinstance(module, nn.Conv1d):
            yield Inputs((_normal(BATCH, module.in_channels, 64),))
        else:
            continue
        return
