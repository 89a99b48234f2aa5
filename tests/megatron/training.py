"""The same training on sharded ranks and in one process, and how far apart they end."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from standin import cuda_standin
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.optim import AdamW, Optimizer
from transformers import LlamaConfig, LlamaForCausalLM

from shardwright.distributed.apply.megatron_fsdp import Options, attach_optimizer, full_tensor, prepare

VOCABULARY, LENGTH, ROWS = 64, 12, 2


@dataclass(frozen=True)
class Case:
    """One way to train.

    Attributes:
        options: of the engine.
        tp, cp: ranks of these axes; the rest are ``dp``.
        optimizer: who makes it: ``"before"`` (from the whole model, handed over), ``"bare"`` (from the sharded model's
            parameters, handed to nobody) or ``"attached"``.
        accumulation: micro-batches per step.
        inner: call the model inside the wrapper.
    """

    options: dict[str, Any] = field(default_factory=dict)
    tp: int = 1
    cp: int = 1
    tied: bool = False
    frozen: bool = False
    optimizer: str = "before"
    accumulation: int = 1
    clip: float | None = None
    set_to_none: bool = True
    inner: bool = False
    steps: int = 3


def build_model(tied: bool = False, frozen: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        max_position_embeddings=LENGTH,
    )
    model = LlamaForCausalLM(config)
    if frozen:
        model.model.embed_tokens.requires_grad_(False)
        model.model.layers[0].self_attn.requires_grad_(False)
    return model


@cache
def mesh_of(dp: int, cp: int, tp: int, device: str) -> DeviceMesh:
    return init_device_mesh(device, (dp, cp, tp), mesh_dim_names=("dp", "cp", "tp"))


def case_mesh(case: Case) -> DeviceMesh:
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    return mesh_of(dist.get_world_size() // (case.tp * case.cp), case.cp, case.tp, device)


def environment() -> Any:
    return nullcontext() if dist.get_backend() == "nccl" else cuda_standin()


def tensor_parallel(model: LlamaForCausalLM, mesh: DeviceMesh) -> None:
    """Plain torch tensor parallelism: norms stay plain, the embedding's gradient arrives replicated."""
    tied = model.config.tie_word_embeddings
    plan: dict[str, Any] = {"model.embed_tokens": RowwiseParallel(input_layouts=_replicate())}
    for number in range(len(model.model.layers)):
        layer = f"model.layers.{number}"
        plan |= {f"{layer}.self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
        plan |= {f"{layer}.mlp.{name}_proj": ColwiseParallel() for name in ("gate", "up")}
        plan |= {f"{layer}.self_attn.o_proj": RowwiseParallel(), f"{layer}.mlp.down_proj": RowwiseParallel()}
    plan["lm_head"] = ColwiseParallel(output_layouts=_replicate())
    parallelize_module(model, mesh, plan)
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight


def _replicate() -> Any:
    from torch.distributed.tensor import Replicate

    return Replicate()


def groups(model: nn.Module) -> list[dict[str, Any]]:
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0, "lr": 3e-2},
    ]


def make_optimizer(model: nn.Module) -> Optimizer:
    return AdamW(groups(model), lr=1e-2)


def batch(step: int, micro: int, share: int, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + 100 * micro + share)
    return torch.randint(VOCABULARY, (ROWS, LENGTH), generator=generator).to(device)


def loop(
    model: nn.Module, optimizer: Optimizer, case: Case, shares: list[int], parameters: Callable[[], Any], device: str
) -> list[Any]:
    """Train on the mean loss over ``shares``; returns the losses, and the gradient norms where there is clipping."""
    seen = []
    for step in range(case.steps):
        for micro in range(case.accumulation):
            for share in shares:
                ids = batch(step, micro, share, device)
                loss = model(input_ids=ids, labels=ids).loss
                seen.append(loss.item())
                (loss / case.accumulation / len(shares)).backward()
        if case.clip is not None:
            norm = nn.utils.clip_grad_norm_([p for p in parameters() if p.grad is not None], case.clip)
            seen.append(full_tensor(norm).item() if norm.ndim == 0 else norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=case.set_to_none)
    return seen


def shard(case: Case, model: nn.Module, optimizer: Optimizer | None) -> nn.Module:
    mesh = case_mesh(case)
    step = prepare(model, mesh, optimizer, Options(**case.options))
    if case.tp > 1:
        tensor_parallel(model, mesh["tp"])
    sharded, same = step.shard()
    assert same is optimizer
    return sharded


def compare(case: Case) -> tuple[float, float]:
    """The largest difference of a loss, and the largest relative difference of a parameter, after the steps."""
    mesh = case_mesh(case)
    device = mesh.device_type
    whole = build_model(case.tied, case.frozen).to(device)
    model = copy.deepcopy(whole)
    shares = mesh.size() // case.tp
    with environment():
        optimizer = make_optimizer(model) if case.optimizer == "before" else None
        sharded = shard(case, model, optimizer)
        if optimizer is None:
            optimizer = make_optimizer(sharded)
            if case.optimizer == "attached":
                attach_optimizer(sharded, optimizer)
        mine = [dist.get_rank() // case.tp]
        losses = loop(model if case.inner else sharded, optimizer, case, mine, sharded.parameters, device)
        params = {name: full_tensor(p) for name, p in model.named_parameters()}
        assert set(params) == {name for name, _ in whole.named_parameters()}
    expected = loop(whole, make_optimizer(whole), case, list(range(shares)), whole.parameters, device)
    per_step = [x for i, x in enumerate(expected) if _is_mine(i, case, shares, mine[0])]
    loss_error = max(abs(a - b) for a, b in zip(losses, per_step, strict=True))
    param_error = max(float((params[n] - p).norm() / p.norm()) for n, p in whole.named_parameters())
    return loss_error, param_error


def _is_mine(index: int, case: Case, shares: int, mine: int) -> bool:
    """Whether entry ``index`` of the one-process record is one that this rank records too."""
    per_step = shares * case.accumulation + (case.clip is not None)
    place = index % per_step
    return place == shares * case.accumulation or place % shares == mine
