"""Whether a model keeps the examples apart that share a row, found by running a tiny one of its kind."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig

from shardwright.errors import ConfigError, ShardwrightError
from shardwright.untrusted import ToldAs
from shardwright.verify.shrink import FIRST_FREE_ID, LAST_PLAIN_ID
from shardwright.verify.tiny import randomize, shrunk_config

_LENGTHS = (5, 7)
_TOLERANCE = 1e-4
_WAY_OUT = "Set data.pack=false, so that each example has a sequence of its own."


@torch.no_grad()
def check_keeps_apart(config: PreTrainedConfig) -> None:
    """Run two examples in one row, and each alone: positions that begin anew must be all that a model needs.

    Models of transformers with attention of theirs read the bounds of examples from ``position_ids``; others (state
    spaces, some that add positions to attention) do not.

    Raises:
        ConfigError: they see each other, or the model takes no positions.
    """
    name = config.model_type
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(FIRST_FREE_ID, LAST_PLAIN_ID, (1, n), generator=generator) for n in _LENGTHS]
    places = [torch.arange(n)[None] for n in _LENGTHS]
    try:
        with ToldAs(ConfigError, f"{name}, tried on a tiny model, cannot take two examples in one sequence"):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(shrunk_config(config), dtype=torch.float32)
            randomize(model)
            model.eval()

            def logits(ids: list[Tensor], positions: list[Tensor]) -> Tensor:
                given = {"input_ids": torch.cat(ids, 1), "position_ids": torch.cat(positions, 1)}
                return model(**given, use_cache=False).logits

            packed = logits(texts, places)
            apart = torch.cat([logits([text], [place]) for text, place in zip(texts, places, strict=True)], 1)
    except ShardwrightError as error:
        raise ConfigError(f"{error} {_WAY_OUT}") from error
    if not torch.allclose(packed, apart, rtol=_TOLERANCE, atol=_TOLERANCE):
        raise ConfigError(
            f"Examples that share a sequence are not apart in {name}: in a tiny model the second one's logits change "
            f"by {float((packed - apart).abs().max()):.1e}. {_WAY_OUT}"
        )
