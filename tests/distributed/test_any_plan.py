"""Any plan, right or wrong, is applied whole or leaves the model as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import build
from torch import nn

from shardwright import ParallelConfig, make_mesh
from shardwright.distributed.steps import parallelize_with_fsdp2
from shardwright.errors import ShardwrightError

BLOCK = "model.layers.*"
PARTS = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj self_attn mlp.up_proj mlp.gate_proj"
MORE_PARTS = "mlp.down_proj mlp input_layernorm mlp.nothing mlp.act_fn"
OTHERS = ["model.embed_tokens", "model.norm", "lm_head", "model.layers.0.mlp.up_proj", "model", "*", "", "**"]
NAMES = [*(f"{BLOCK}.{part}" for part in f"{PARTS} {MORE_PARTS}".split()), *OTHERS]
STYLES = ["colwise", "rowwise", "colwise_rep", "replicate", "sequence_parallel", "embedding_rowwise", "no such style"]


def _state(model: nn.Module) -> list[Any]:
    return [
        *((name, type(module), vars(module).get("forward")) for name, module in model.named_modules()),
        *((name, id(value), type(value), value.shape) for name, value in model.named_parameters()),
    ]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(NAMES), st.sampled_from(STYLES), max_size=8), st.booleans())
def test_any_plan_is_applied_or_refused(
    fake_world: Callable[..., None], plan: dict[str, str], sequence_parallel: bool
) -> None:
    if not torch.distributed.is_initialized():
        fake_world(2)
    config = ParallelConfig(tp=2, sequence_parallel=sequence_parallel)
    mesh = make_mesh(config, "cpu")
    model = build("llama")
    before = _state(model)
    try:
        parallelize_with_fsdp2(model, mesh, config, mp_policy=None, plan=plan)
    except ShardwrightError:
        assert _state(model) == before
