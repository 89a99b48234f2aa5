"""What ``ParallelConfig.precision`` says is computed in, whatever the model's dtype; rounded weights are warned of."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import batch, build
from torch import nn

from shardwright import ParallelConfig, load_pretrained, parallelize
from shardwright.distributed.precision import BF16_MIXED, FLOAT32, Precision
from shardwright.verify.ranks import RankPool, shared_mesh
from shardwright.verify.step import full

WAYS = {"tp": ParallelConfig(tp=2), "tp+sp": ParallelConfig(tp=2, sequence_parallel=True), "fsdp2": ParallelConfig()}


class _Words(logging.Handler):
    """Collects what Shardwright's logger says."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())

    def __enter__(self) -> list[str]:
        logging.getLogger("shardwright").addHandler(self)
        return self.said

    def __exit__(self, *error: Any) -> None:
        logging.getLogger("shardwright").removeHandler(self)


class _Dtypes:
    """The dtypes that linear layers compute in."""

    def __init__(self, model: nn.Module) -> None:
        self.seen: set[torch.dtype] = set()
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(self._note)

    def _note(self, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        self.seen.add(output.dtype)


def _step(config: ParallelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """A training step, and the same one in one process that computes in the dtype that the config says."""
    whole = build("llama").to(dtype)
    with _Words() as said:
        model = parallelize(copy.deepcopy(whole), config, shared_mesh(config))
    computed = _Dtypes(model)
    optimizer = torch.optim.AdamW(model.parameters())
    loss = model(**batch(0)).loss
    loss.backward()
    optimizer.step()
    compute = {"model": dtype}.get(config.precision.param) or getattr(torch, config.precision.param)
    expected = whole.to(compute)(**batch(0)).loss
    return {
        "loss": abs(loss.item() - expected.item()) / expected.item(),
        "output": loss.dtype,
        "computed": computed.seen,
        "kept": {full(param).dtype for param in model.parameters()},
        "state": {full(state["exp_avg"]).dtype for state in optimizer.state.values()},
        "said": [words for words in said if "optimizer" in words],
    }


@pytest.mark.parametrize("way", list(WAYS))
def test_the_default_is_the_models_own(ranks2: RankPool, way: str) -> None:
    for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        first, second = ranks2.run(_step, WAYS[way], dtype)
        assert first["loss"] < bound
        assert first["computed"] == first["kept"] == first["state"] == {dtype}
        assert second["said"] == []  # the first rank speaks
        if dtype == torch.float32:
            assert first["said"] == []
            continue
        (words,) = first["said"]
        assert words.startswith("21 trainable parameters of this LlamaForCausalLM are kept in bfloat16")
        assert 'ParallelConfig(precision="bf16")' in words


@pytest.mark.parametrize("way", list(WAYS))
def test_what_is_asked_for_is_computed_in(ranks2: RankPool, way: str) -> None:
    float32 = ranks2.run(_step, WAYS[way].with_(precision="float32"), torch.bfloat16)[0]
    assert float32["loss"] < 1e-5
    assert (float32["computed"], float32["kept"]) == ({torch.float32}, {torch.bfloat16})
    assert len(float32["said"]) == 1
    mixed = ranks2.run(_step, WAYS[way].with_(precision="bf16"), torch.float32)[0]
    assert mixed["loss"] < 1e-2
    assert (mixed["computed"], mixed["kept"], mixed["state"]) == ({torch.bfloat16}, {torch.float32}, {torch.float32})
    assert (mixed["output"], mixed["said"]) == (torch.float32, [])


def _frozen() -> list[str]:
    """Nothing is lost where nothing in half precision trains."""
    model = build("llama").bfloat16().requires_grad_(False)
    with _Words() as said:
        parallelize(model, WAYS["tp"], shared_mesh(WAYS["tp"]))
    return said


def test_a_frozen_model_is_no_matter(ranks2: RankPool) -> None:
    assert ranks2.run(_frozen) == [[], []]


def _loaded(folder: Path, dtype: torch.dtype | None) -> tuple[set[torch.dtype], list[str]]:
    with _Words() as said:
        model = load_pretrained(folder, WAYS["tp"], shared_mesh(WAYS["tp"]), dtype=dtype)
    return {full(param).dtype for param in model.parameters()}, [words for words in said if "optimizer" in words]


def test_a_folder_in_half_precision(ranks2: RankPool, tmp_path: Path) -> None:
    build("llama").bfloat16().save_pretrained(tmp_path)
    kept, said = ranks2.run(_loaded, tmp_path, None)[0]
    assert kept == {torch.bfloat16}
    assert "dtype=torch.float32" in said[0]
    assert ranks2.run(_loaded, tmp_path, torch.float32)[0] == ({torch.float32}, [])


def test_settled() -> None:
    nothing = Precision()
    assert nothing.settled(["bfloat16"]) == nothing.settled([]) == FLOAT32.settled(["float32"]) == nothing
    assert Precision("bfloat16").settled(["float32"]) == BF16_MIXED.settled(["float32"]) == BF16_MIXED
    assert FLOAT32.settled(["bfloat16"]) == FLOAT32
    assert FLOAT32.settled(["float32", "bfloat16"]) == FLOAT32  # some would be cast
    assert Precision(output="float32").settled(["bfloat16"]) == Precision("bfloat16", "bfloat16", "float32")
