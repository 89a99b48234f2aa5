"""Quantized weights: exact where they are sharded, refused by name before anything is changed where they are not."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from steps import assert_same_gradients
from tiny_models import batch, build
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from shardwright import ParallelConfig, parallelize
from shardwright.distributed.apply.quantized import quantized_weights
from shardwright.errors import UnsupportedError
from shardwright.verify.ranks import RankPool, shared_mesh

pytest.importorskip("bitsandbytes")

WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}  # a block of 4-bit values is 64 long
KINDS: dict[str, dict[str, Any]] = {
    "4-bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "8-bit": {"load_in_8bit": True},
}
FSDP2 = ParallelConfig(dp_shard=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    build("llama", **WIDE).save_pretrained(path)
    return path


def _load(folder: Path, kind: str, adapters: bool) -> nn.Module:
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**KINDS[kind]), dtype=torch.float32, device_map="cpu"
    )
    if adapters:
        torch.manual_seed(1)
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    return model.train()


class _Float8Linear(nn.Module):
    """A layer of a user's own whose weight is in float8, with one scale."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        scale = layer.weight.detach().abs().max() / 448
        self.weight = nn.Parameter((layer.weight.detach() / scale).to(torch.float8_e4m3fn), requires_grad=False)
        self.scale = nn.Parameter(scale.reshape(1), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        assert self.weight.dtype == torch.float8_e4m3fn
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale)


def _float8() -> nn.Module:
    model = build("llama")
    for block in model.model.layers:
        block.mlp.up_proj = _Float8Linear(block.mlp.up_proj)
        block.self_attn.k_proj = _Float8Linear(block.self_attn.k_proj)
    return model


def _exact(make: Callable[[], nn.Module], config: ParallelConfig) -> None:
    reference, model = make(), parallelize(make(), config, shared_mesh(config))
    for index in range(2):
        mine, theirs = model(**batch(index)).loss, reference(**batch(index)).loss
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=0)
        mine.backward()
        theirs.backward()
    assert_same_gradients(model, reference)
    assert all(isinstance(param, DTensor) for param in model.parameters())  # sharded, all of it


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("adapters", [True, False], ids=["lora", "norms"])
def test_four_bit_under_fsdp2(ranks2: RankPool, folder: Path, adapters: bool, checkpointing: str) -> None:
    config = FSDP2.with_(activation_checkpointing=checkpointing)
    ranks2.run(_exact, partial(_load, folder, "4-bit", adapters), config)


def test_float8_under_fsdp2(ranks2: RankPool) -> None:
    ranks2.run(_exact, _float8, FSDP2)


def _refused(make: Callable[[], nn.Module], config: ParallelConfig) -> str:
    model = make()
    before = {name: id(param) for name, param in model.named_parameters()}
    with pytest.raises(UnsupportedError) as caught:
        parallelize(model, config, shared_mesh(config))
    assert {name: id(param) for name, param in model.named_parameters()} == before
    assert not any("_around" in vars(module) for module in model.modules())
    return str(caught.value)


@pytest.mark.parametrize("adapters", [True, False], ids=["lora", "plain"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_tensor_parallelism_is_refused(ranks2: RankPool, folder: Path, kind: str, adapters: bool) -> None:
    for message in ranks2.run(_refused, partial(_load, folder, kind, adapters), ParallelConfig(tp=2)):
        assert f"is quantized (bitsandbytes {kind}: " in message
        assert "and 13 more), and tensor parallelism (tp=2) would cut" in message
        assert "tp=1" in message


def test_eight_bit_is_refused(ranks2: RankPool, folder: Path) -> None:
    for message in ranks2.run(_refused, partial(_load, folder, "8-bit", True), FSDP2):
        assert "bitsandbytes 8-bit" in message
        assert "q_proj" in message


def test_float8_is_refused_where_it_would_be_cast(ranks2: RankPool) -> None:
    for message in ranks2.run(_refused, _float8, FSDP2.with_(precision="bf16")):
        assert "float8" in message
        assert "without their scales" in message
    assert "tensor parallelism" in ranks2.run(_refused, _float8, ParallelConfig(tp=2))[0]


def _loaded_otherwise() -> nn.Module:
    """As transformers leaves a GPTQ model: no parameter says that it is quantized."""
    model = build("llama")
    vars(model)["hf_quantizer"] = SimpleNamespace(quantization_config=SimpleNamespace(quant_method="gptq"))
    return get_peft_model(model, LoraConfig(target_modules=["q_proj"]))


def _packed() -> nn.Module:
    model = build("llama")
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(torch.ones(layer.weight.shape, dtype=torch.uint8), requires_grad=False)
    return model


@pytest.mark.parametrize("config", [FSDP2, ParallelConfig(tp=2)], ids=["fsdp2", "tp"])
def test_other_formats_are_refused(ranks2: RankPool, config: ParallelConfig) -> None:
    assert "(gptq: base_model.model)" in ranks2.run(_refused, _loaded_otherwise, config)[0]
    assert "(uint8: model.layers.0.mlp.up_proj.weight)" in ranks2.run(_refused, _packed, config)[0]


def test_plain_models_have_none() -> None:
    assert quantized_weights(build("llama")) == {}
    assert quantized_weights(build("llama").bfloat16()) == {}
