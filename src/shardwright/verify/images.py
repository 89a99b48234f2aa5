"""Batches with images, for image-text-to-text models."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from shardwright.verify.shrink import FIRST_FREE_ID, LAST_PLAIN_ID
from shardwright.verify.stages import ShrinkError, Stage

ROWS = 2
TEXT_LENGTH = 12
CHANNELS = 3


@dataclass(frozen=True)
class ImageText:
    """Makes batches of ``ROWS`` rows, each one image followed by ``TEXT_LENGTH`` tokens.

    Attributes:
        pixels: shape of ``pixel_values`` for the whole batch.
        fixed: other arguments that describe the images, the same in every batch.
        image_token: id that stands for one image feature among the input ids.
        image_tokens: number of features per image.
        token_types: arguments that mark the image tokens among the ids with a one.
    """

    pixels: tuple[int, ...]
    fixed: dict[str, torch.Tensor]
    image_token: int
    image_tokens: int
    token_types: tuple[str, ...] = ()
    start: int = 0

    def __call__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(self.start + index)
        text = torch.randint(FIRST_FREE_ID, LAST_PLAIN_ID, (ROWS, TEXT_LENGTH), generator=generator)
        image = torch.full((ROWS, self.image_tokens), self.image_token)
        ids = torch.cat([text[:, :2], image, text[:, 2:]], dim=1)
        is_image = torch.zeros_like(ids, dtype=torch.bool)
        is_image[:, 2 : 2 + self.image_tokens] = True
        batch = {"input_ids": ids, "labels": ids.masked_fill(is_image, -100)}
        batch |= {"pixel_values": torch.randn(self.pixels, generator=generator), **self.fixed}
        return batch | {name: is_image.long() for name in self.token_types}


def image_batches(model: PreTrainedModel, start: int = 0) -> ImageText | None:
    """Batches on which the vision tower of ``model`` takes part in the loss; None where no known layout fits.

    The layouts are tried one by one: the one that counts makes a gradient reach the tower.
    """
    config = model.config.to_dict()
    token = next((config[name] for name in ("image_token_id", "image_token_index") if config.get(name)), None)
    if "pixel_values" not in inspect.signature(model.forward).parameters:
        return None
    encoders: list[Any] = [part for part in (model, model.base_model) if hasattr(part, "get_image_features")]
    if not isinstance(config.get("vision_config"), dict):
        return None
    if token is None:  # features that take no place among the tokens
        encoders = []
    accepted = set(inspect.signature(model.forward).parameters)
    types = tuple(name for name in ("token_type_ids", "mm_token_type_ids") if name in accepted)
    described = {name for part in encoders for name in inspect.signature(part.get_image_features).parameters}
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for pixels, fixed in _layouts(config["vision_config"], described & accepted):
        try:
            with Stage(ShrinkError, "This layout of images does not fit"):
                count = _feature_count(encoders[0], pixels, fixed) if encoders else 0
                batches = ImageText(pixels, fixed, token or 0, count // ROWS, types, start)
                loss = model(**batches(0))["loss"]
                gradients = torch.autograd.grad(loss, list(trainable.values()), allow_unused=True)
        except ShrinkError:
            continue
        reached = [name for name, g in zip(trainable, gradients, strict=True) if g is not None]
        if any("vision" in name or "visual" in name for name in reached):
            return batches
    return None


def _layouts(fields: dict[str, Any], accepted: set[str]) -> Iterator[tuple[tuple[int, ...], dict[str, Any]]]:
    """Shapes of ``pixel_values`` with the arguments that go with them."""
    patch = _side(fields.get("patch_size", 16))
    if "image_grid_thw" in accepted:
        side = 2 * int(fields.get("spatial_merge_size") or 2)
        frames = int(fields.get("temporal_patch_size") or fields.get("patch_temporal") or 1)
        grids = {"image_grid_thw": torch.tensor([[1, side, side]] * ROWS)}
        if "image_merge_sizes" in accepted:
            grids["image_merge_sizes"] = torch.tensor([2] * ROWS)
        for depth in dict.fromkeys((frames, 1)):
            yield (ROWS * side * side, CHANNELS * depth * patch * patch), grids
            yield (ROWS * side * side, CHANNELS, patch, patch), grids
        return
    if "spatial_shapes" in accepted:
        shapes = {"spatial_shapes": torch.tensor([[4, 4]] * ROWS), "pixel_attention_mask": torch.ones(ROWS, 16).long()}
        yield (ROWS, 16, CHANNELS * patch * patch), shapes
        return
    size = _side(fields.get("image_size", 2 * patch))
    sizes = {"image_sizes": torch.tensor([[size, size]] * ROWS)} if "image_sizes" in accepted else {}
    for described in (sizes, {}) if sizes else ({},):
        for tiles in ((), (1,), (2,), (3,)):
            yield (ROWS, *tiles, CHANNELS, size, size), described


def _side(value: int | list[int] | tuple[int, ...]) -> int:
    return value if isinstance(value, int) else value[0]


@torch.no_grad()
def _feature_count(encoder: Any, pixels: tuple[int, ...], fixed: dict[str, Any]) -> int:
    """How many image features ``get_image_features`` makes of all images together."""
    output = encoder.get_image_features(pixel_values=torch.randn(pixels), **fixed)
    features = output["pooler_output"] if hasattr(output, "keys") else output
    if isinstance(features, torch.Tensor):
        return features[..., 0].numel()
    return sum(feature[..., 0].numel() for feature in features)
