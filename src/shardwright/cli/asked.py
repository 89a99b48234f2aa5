"""The options that ``estimate`` and ``suggest`` share: the model and the GPUs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from typing import Any

import click

from shardwright.distributed.precision import DTYPES

_OPTIONS = (
    click.argument("model"),
    click.option("--gpus", required=True, type=click.IntRange(1), help="How many, one for each rank."),
    click.option("--gpu", required=True, help="A device, such as h100-80gb, or a YAML file that describes one."),
    click.option(
        "--weights",
        type=click.Choice(DTYPES),
        default="float32",
        show_default=True,
        help="Dtype in which parameters, gradients and the optimizer's state are kept.",
    ),
    click.option("--lora", default=0, help="Rank of LoRA adapters on all linear layers; the rest is frozen."),
    click.option("--network", default="ib-ndr", show_default=True, help="The fabric between nodes."),
    click.option("--gpus-per-node", type=click.IntRange(1), help="Instead of what is usual for the device."),
)


def about_model_and_gpus(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command these options; it gets them as ``asked``, a :class:`shardwright.estimate.asked.Asked`."""

    @wraps(function)
    def command(**values: Any) -> None:
        from shardwright.estimate.asked import Asked

        asked = Asked(**{field.name: values.pop(field.name) for field in fields(Asked)})
        function(asked=asked, **values)

    made: Callable[..., None] = command
    for option in reversed(_OPTIONS):
        made = option(made)
    return made
