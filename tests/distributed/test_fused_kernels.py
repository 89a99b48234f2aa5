"""Models that Liger and its like have put their kernels into: refused by name under TP, left alone under FSDP2.

The packages need a GPU, so functions here only say that they come from them, in the places where Liger 0.8.5 puts its.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers.models.llama.modeling_llama as llama
from tiny_models import batch, build
from torch import nn

from shardwright import ParallelConfig, parallelize
from shardwright.errors import UnsupportedError
from shardwright.verify.ranks import RankPool, shared_mesh


def _from(package: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` under another origin."""

    def kernel(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    kernel.__module__ = package
    return kernel


@contextmanager
def _replaced(owner: Any, name: str, package: str) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, _from(package, before))
    try:
        yield
    finally:
        setattr(owner, name, before)


LIGER = "liger_kernel.transformers.something"


def _on_instances(model: nn.Module) -> nn.Module:
    for block in model.model.layers:
        block.mlp.forward = MethodType(_from(LIGER, type(block.mlp).forward), block.mlp)
    return model


def _refusal(model: nn.Module) -> str:
    config = ParallelConfig(tp=2)
    with pytest.raises(UnsupportedError) as caught:
        parallelize(model, config, shared_mesh(config))
    assert not any("_around" in vars(module) for module in model.modules())
    return str(caught.value)


def _refusals() -> list[str]:
    """A forward on an instance, one on a class, a function in the model's file, the loss in torch; another package."""
    messages = [_refusal(_on_instances(build("llama")))]
    places = [(llama.LlamaForCausalLM, "forward"), (llama, "apply_rotary_pos_emb"), (F, "cross_entropy")]
    for owner, name in places:
        with _replaced(owner, name, LIGER):
            messages.append(_refusal(build("llama")))
    with _replaced(llama.LlamaForCausalLM, "forward", "cut_cross_entropy.transformers.llama"):
        messages.append(_refusal(build("llama")))
    return messages


def test_refused_under_tensor_parallelism(ranks2: RankPool) -> None:
    for messages in ranks2.run(_refusals):
        named = ["model.layers.0.mlp, model.layers.1.mlp", "its own forward", "apply_rotary_pos_emb", "cross_entropy"]
        for message, name in zip(messages, named, strict=False):
            assert message.startswith("This LlamaForCausalLM runs kernels of Liger (")
            assert name in message
            assert "loss_tiles" in message
        assert "kernels of cut_cross_entropy (its own forward)" in messages[-1]


def _under_fsdp2() -> None:
    reference, config = build("llama"), ParallelConfig(dp_shard=2)
    model = parallelize(_on_instances(build("llama")), config, shared_mesh(config))
    torch.testing.assert_close(model(**batch(0)).loss, reference(**batch(0)).loss)


def test_left_alone_under_fsdp2(ranks2: RankPool) -> None:
    ranks2.run(_under_fsdp2)
