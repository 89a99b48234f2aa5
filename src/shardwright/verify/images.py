"""Batches with images, for image-text-to-text models."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from shardwright.verify.shrink import FIRST_FREE_ID, LAST_PLAIN_ID
from shardwright.verify.stages import ShrinkError, Stage

ROWS = 2
TEXT_LENGTH = 12
CHANNELS = 3


# Fields of a config: the id that stands for an image feature among the tokens, and how many an image is turned into
# where the model has no ``get_image_features`` to ask.
TOKENS = ("image_token_id", "image_token_index", "video_token_index")
COUNTS = ("num_query_tokens", "latent_query_num")


def _marked(ids: torch.Tensor, is_image: torch.Tensor) -> torch.Tensor:
    return is_image.long()


# What else a forward may ask for, by name, made from the ids and from which of them stand for an image.
ARGUMENTS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "token_type_ids": _marked,
    "mm_token_type_ids": _marked,
    "image_embeds_position_mask": _marked,
    "image_attention_mask": lambda ids, is_image: torch.ones(*ids.shape, 1).long(),
    "qformer_input_ids": lambda ids, is_image: ids[:, -TEXT_LENGTH + 2 :],
}


@dataclass(frozen=True)
class ImageText:
    """Makes batches of ``ROWS`` rows, each one image followed by ``TEXT_LENGTH`` tokens.

    Attributes:
        images: the argument that takes the images, and its shape for the whole batch.
        fixed: other arguments that describe the images, the same in every batch.
        image_token: id that stands for one image feature among the input ids.
        image_tokens: number of features per image.
        arguments: names of ``ARGUMENTS`` that the model takes.
        ids: where the text goes beside the labels: ``input_ids``, or ``decoder_input_ids`` (moved on by one).
    """

    images: tuple[str, tuple[int, ...]]
    fixed: dict[str, torch.Tensor]
    image_token: int
    image_tokens: int
    arguments: tuple[str, ...] = ()
    ids: tuple[str, ...] = ("input_ids",)
    start: int = 0

    def __call__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(self.start + index)
        text = torch.randint(FIRST_FREE_ID, LAST_PLAIN_ID, (ROWS, TEXT_LENGTH), generator=generator)
        image = torch.full((ROWS, self.image_tokens), self.image_token)
        ids = torch.cat([text[:, :2], image, text[:, 2:]], dim=1)
        is_image = torch.zeros_like(ids, dtype=torch.bool)
        is_image[:, 2 : 2 + self.image_tokens] = True
        given = {"input_ids": ids, "decoder_input_ids": ids.roll(1, dims=1)}
        batch = {name: given[name] for name in self.ids}
        batch |= {"labels": ids.masked_fill(is_image, -100), self.images[0]: self._pixels(generator), **self.fixed}
        return batch | {name: ARGUMENTS[name](ids, is_image) for name in self.arguments}

    def _pixels(self, generator: torch.Generator) -> torch.Tensor:
        name, shape = self.images
        pixels = torch.randn(shape, generator=generator)
        if name == "flattened_patches":  # each with its row and its column, from one
            side = int(shape[1] ** 0.5)
            pixels[..., :2] = torch.cartesian_prod(*[torch.arange(1.0, 1 + side)] * 2)
        return pixels


def image_batches(model: PreTrainedModel, start: int = 0) -> ImageText | None:
    """Batches on which the vision tower of ``model`` takes part in the loss; None where no known layout fits.

    The layouts are tried one by one: the one that counts makes a gradient reach the tower.
    """
    config = model.config.to_dict()
    fields = vision_fields(config)
    accepted = set(inspect.signature(model.forward).parameters)
    if fields is None or not accepted & {"pixel_values", "flattened_patches"}:
        return None
    token = next((config[name] for name in TOKENS if config.get(name)), None)
    encoders: list[Any] = [part for part in (model, model.base_model) if hasattr(part, "get_image_features")]
    described = {name for part in encoders for name in inspect.signature(part.get_image_features).parameters}
    arguments = tuple(name for name in ARGUMENTS if name in accepted)
    ids = tuple(name for name in ("input_ids",) if name in accepted)
    if model.config.is_encoder_decoder and not ids:
        ids = ("decoder_input_ids",)
    places = token is not None or "image_embeds_position_mask" in accepted  # else features take none among the tokens
    for images, fixed in _layouts(fields, accepted, described):
        with contextlib.suppress(ShrinkError), Stage(ShrinkError, "This layout of images does not fit"):
            asked = {name: ARGUMENTS[name](*_PLAIN) for name in arguments if name in described}
            count = _feature_count(encoders, config, images[1], fixed | asked) if places else 0
            batches = ImageText(images, fixed, token or 0, count // ROWS, arguments, ids, start)
            if _reaches_the_tower(model, batches):
                return batches
    return None


def vision_fields(config: dict[str, Any]) -> dict[str, Any] | None:
    """The part of a config that describes a tower for images: ``vision_config``, or an encoder that has patches."""
    parts = [config.get("vision_config"), config.get("encoder")]
    return next((part for part in parts if isinstance(part, dict) and _PATCHES & part.keys()), parts[0] or None)


_PATCHES = {"patch_size", "patch_embed_hidden_size", "image_size"}
_PLAIN = (torch.full((ROWS, TEXT_LENGTH), FIRST_FREE_ID), torch.zeros(ROWS, TEXT_LENGTH).bool())


def _reaches_the_tower(model: PreTrainedModel, batches: ImageText) -> bool:
    """Whether a gradient reaches the tower, or the images themselves, where its name does not tell which it is."""
    batch = batches(0)
    pixels = batch[batches.images[0]].requires_grad_()
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    loss = model(**batch)["loss"]
    gradients = torch.autograd.grad(loss, [*trainable.values(), pixels], allow_unused=True)
    if gradients[-1] is not None and bool(gradients[-1].any()):
        return True
    reached = [name for name, gradient in zip(trainable, gradients, strict=False) if gradient is not None]
    return any("vision" in name or "visual" in name for name in reached)


def _layouts(
    fields: dict[str, Any], accepted: set[str], described: set[str]
) -> Iterator[tuple[tuple[str, tuple[int, ...]], dict[str, Any]]]:
    """The argument that takes the images, and its shape, with the arguments that go with them."""
    if "flattened_patches" in accepted:
        yield ("flattened_patches", (ROWS, 16, 2 + int(fields["patch_embed_hidden_size"]))), {}
        return
    for shape, others in _pixel_layouts(fields, accepted & described):
        yield ("pixel_values", shape), others


def _pixel_layouts(fields: dict[str, Any], accepted: set[str]) -> Iterator[tuple[tuple[int, ...], dict[str, Any]]]:
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
        for tiles in ((), (1,), (2,), (3,), (4,)):
            yield (ROWS, *tiles, CHANNELS, size, size), described


def _side(value: int | list[int] | tuple[int, ...]) -> int:
    return value if isinstance(value, int) else value[0]


@torch.no_grad()
def _feature_count(encoders: list[Any], config: dict[str, Any], shape: tuple[int, ...], fixed: dict[str, Any]) -> int:
    """How many image features all images together are turned into."""
    if not encoders:
        each = next((config[name] for name in COUNTS if name in config), 0)
        return int(each) * math.prod(shape[:-3])
    output = encoders[0].get_image_features(pixel_values=torch.randn(shape), **fixed)
    features = output["pooler_output"] if hasattr(output, "keys") else output
    if isinstance(features, torch.Tensor):
        return features[..., 0].numel()
    return sum(feature[..., 0].numel() for feature in features)
