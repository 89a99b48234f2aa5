"""Tiny models of the families that tests use most, batches for them, and ways to spread them; picklable by name."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from shardwright import ParallelConfig, parallelize
from shardwright.verify.compare import Report
from shardwright.verify.ranks import RankPool
from shardwright.verify.run import Case, run_case
from shardwright.verify.tiny import randomize

VOCABULARY = 99  # odd, so that no tensor-parallel size divides it
LENGTH = 15
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# Family -> what it needs beyond the sizes. A window shorter than the batch makes sliding attention do something.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 6},
    "gemma": {},
    "gemma2": {"sliding_window": 6, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 6, "query_pre_attn_scalar": 8},
    "phi3": {},
}
EXPECTED_SHARE = 0.99  # of the matrices' elements that tensor parallelism cuts, where key-value heads divide


def build(family: str, **changes: Any) -> PreTrainedModel:
    """A causal LM in float32 on CPU with the same weights at every call, none of them at a special value."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES.get(family, {}), **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomize(model)
    return model.train()


def batch(index: int, vocabulary: int = VOCABULARY, rows: int = 2, length: int = LENGTH) -> dict[str, torch.Tensor]:
    """Ids over the whole vocabulary, its first and last entry among them; different for every index."""
    generator = torch.Generator().manual_seed(100 + index)
    ids = torch.randint(0, vocabulary, (rows, length), generator=generator)
    if length > 2:
        ids[0, 0], ids[-1, 1] = 0, vocabulary - 1
    return {"input_ids": ids, "labels": ids.clone()}


def from_meta(model: nn.Module, config: ParallelConfig, mesh: DeviceMesh) -> nn.Module:
    """Parallelize a model that has no weights yet, then load those of ``model`` into its DTensors."""
    assert isinstance(model, PreTrainedModel)
    with torch.device("meta"):
        empty = type(model)(model.config)
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert parallelize(empty, config, mesh) is empty
    empty.to_empty(device="cpu")
    load_whole(empty, model)
    return empty.train()


@torch.no_grad()
def load_whole(model: nn.Module, whole: nn.Module) -> None:
    """Copy the parameters and buffers of ``whole``, which is in one piece, into those of ``model``.

    Buffers too: rotary frequencies are in no state dict, and garbage after ``to_empty``. torch's
    ``set_model_state_dict`` would do for the parameters, but its scatter refuses a strided shard of an odd vocabulary.
    """
    values = {**dict(whole.named_parameters(remove_duplicate=False)), **dict(whole.named_buffers())}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        value = values[name]
        if isinstance(tensor, DTensor):
            value = distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)
        tensor.copy_(value)


def measure(
    pool: RankPool,
    family: str,
    config: ParallelConfig,
    *,
    meta: bool = False,
    rows: int = 2,
    length: int = LENGTH,
    accumulate: int = 2,
    **changes: Any,
) -> Report:
    """One training step of ``family`` on the pool against one process: ``verify``'s comparison."""
    vocabulary = changes.get("vocab_size", VOCABULARY)
    case = Case(
        partial(build, family, **changes),
        partial(batch, vocabulary=vocabulary, rows=rows, length=length),
        config,
        accumulate,
        from_meta if meta else parallelize,
    )
    return pool.run(run_case, case)[0]


def assert_exact(report: Report, share: float = 0.0) -> None:
    """The step equals one process to 1e-5 in float32, and at least ``share`` of the matrices was cut."""
    assert report.exact, report
    assert report.precision == "float32", report  # not only in the float64 run that verify makes where rounding shows
    assert report.sharded_fraction >= share, report
