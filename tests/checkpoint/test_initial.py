"""What a model's own initialisation leaves out is found, if it is one number."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from shardwright.checkpoint.initial import Initialiser
from shardwright.errors import UnsupportedError

CONFIG = LlamaConfig(
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    vocab_size=8,
)


class _Forgetful(LlamaForCausalLM):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.known = nn.Parameter(torch.empty(3, 5, dtype=config.extra_dtype))
        self.partly = nn.Parameter(torch.empty(3, 5, dtype=config.extra_dtype))
        self.register_buffer("count", torch.empty(4, dtype=torch.int64))
        self.register_buffer("nothing", torch.empty(0, dtype=config.extra_dtype))

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            with torch.no_grad():
                self.known.fill_(float("inf"))
                self.partly.flatten()[:-1].zero_()
                self.count[:3] = 0
                self.nothing.zero_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_one_number_that_is_left_out(dtype: torch.dtype) -> None:
    config = LlamaConfig(**CONFIG.to_dict())
    config.extra_dtype = dtype
    with torch.device("meta"):
        initial = Initialiser(_Forgetful(config))
    assert initial.value("known").isinf().all()
    assert initial.value("nothing").shape == (0,)
    assert initial.value("model.layers.0.mlp.up_proj.weight").std() > 0
    for name in ("partly", "count"):
        with pytest.raises(UnsupportedError, match=f"does not initialise {name}"):
            initial.value(name)
