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
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.optim import AdamW, Optimizer
from transformers import LlamaConfig, LlamaForCausalLM

from shardwright.distributed.apply.activation_checkpointing import apply_activation_checkpointing
from shardwright.distributed.apply.compile import apply_compile
from shardwright.distributed.apply.megatron_fsdp import Options, attach_optimizer, full_tensor, prepare
from shardwright.distributed.apply.tensor_parallel import apply_tensor_parallel
from shardwright.distributed.parallelizer import nvfsdp_strategy_parallelize
from shardwright.distributed.planning.resolve import resolve
from shardwright.distributed.planning.sources import choose_plan
from shardwright.distributed.replay.reading import ModelReading

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
        plan: whose tensor parallelism: ``"torch"`` or ``"ours"``, or ``"sequence"`` for ours with sequence parallelism.
        checkpointing: of activations: ``"none"``, ``"full"`` or ``"selective"``.
        compile: compile every block.
        summed: the ranks' losses are summed, not averaged.
        public: shard with ``nvfsdp_strategy_parallelize``, which ``options`` are then arguments of.
        axes: what the mesh calls dp, cp and tp.
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
    plan: str = "ours"
    checkpointing: str = "none"
    compile: bool = False
    summed: bool = False
    public: bool = False
    axes: tuple[str, str, str] = ("dp", "cp", "tp")
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
def mesh_of(dp: int, cp: int, tp: int, device: str, axes: tuple[str, str, str] = ("dp", "cp", "tp")) -> DeviceMesh:
    return init_device_mesh(device, (dp, cp, tp), mesh_dim_names=axes)


def device_type() -> str:
    return "cuda" if "cuda:nccl" in str(dist.get_backend_config()) else "cpu"


def case_mesh(case: Case) -> DeviceMesh:
    return mesh_of(dist.get_world_size() // (case.tp * case.cp), case.cp, case.tp, device_type(), case.axes)


def environment() -> Any:
    return nullcontext() if device_type() == "cuda" else cuda_standin()


def torch_plan(model: LlamaForCausalLM) -> dict[str, Any]:
    """Torch's own styles, by the names of modules."""
    plan: dict[str, Any] = {"model.embed_tokens": RowwiseParallel(input_layouts=Replicate())}
    for number in range(len(model.model.layers)):
        layer = f"model.layers.{number}"
        plan |= {f"{layer}.self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
        plan |= {f"{layer}.mlp.{name}_proj": ColwiseParallel() for name in ("gate", "up")}
        plan |= {f"{layer}.self_attn.o_proj": RowwiseParallel(), f"{layer}.mlp.down_proj": RowwiseParallel()}
    plan["lm_head"] = ColwiseParallel(output_layouts=Replicate())
    return plan


def torch_tensor_parallel(model: LlamaForCausalLM, mesh: DeviceMesh) -> None:
    """Plain torch tensor parallelism: norms stay plain, the embedding's gradient arrives replicated."""
    parallelize_module(model, mesh, torch_plan(model))
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight


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
                (loss / case.accumulation / (1 if case.summed else len(shares))).backward()
        if case.clip is not None:
            norm = nn.utils.clip_grad_norm_([p for p in parameters() if p.grad is not None], case.clip)
            seen.append(full_tensor(norm).item() if norm.ndim == 0 else norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=case.set_to_none)
    return seen


def shard(case: Case, model: nn.Module, optimizer: Optimizer | None) -> nn.Module:
    mesh = case_mesh(case)
    if case.public:
        names = dict(zip(("dp_mesh_name", "cp_mesh_name", "tp_mesh_name"), case.axes, strict=True))
        plan = torch_plan(model) if case.plan == "torch" else None
        sharded, same = nvfsdp_strategy_parallelize(
            model, mesh, optimizer, tp_shard_plan=plan, **{**case.options, **names}
        )
        assert same is optimizer
        return sharded
    step = prepare(model, mesh, optimizer, Options(**case.options))
    if case.tp > 1 and case.plan == "torch":
        torch_tensor_parallel(model, mesh["tp"])
    elif case.tp > 1:
        reading = ModelReading(model)
        resolved = resolve(reading, choose_plan(reading), case.tp, sequence_parallel=case.plan == "sequence")
        apply_tensor_parallel(model, mesh["tp"], resolved, units=step.unit_names)
    if case.checkpointing != "none":
        apply_activation_checkpointing(model, step.unit_names, selective=case.checkpointing == "selective")
    if case.compile:
        apply_compile(model, step.unit_names, backend="aot_eager")
    sharded, same = step.shard()
    assert same is optimizer
    return sharded


@dataclass(frozen=True)
class Difference:
    """How far a sharded training ended from the same in one process.

    Attributes:
        seen: largest absolute difference of a loss or gradient norm.
        parameters: largest relative difference of a parameter after the steps.
        moved: smallest relative change of a trained parameter over the steps, so that nothing passes by standing still.
    """

    seen: float
    parameters: float
    moved: float


def compare(case: Case) -> Difference:
    mesh = case_mesh(case)
    device = mesh.device_type
    whole = build_model(case.tied, case.frozen).to(device)
    model, start = copy.deepcopy(whole), copy.deepcopy(whole)
    share = dist.get_rank() // case.tp
    shares = list(range(mesh.size() // case.tp))
    with environment():
        optimizer = make_optimizer(model) if case.optimizer == "before" else None
        sharded = shard(case, model, optimizer)
        if optimizer is None:
            optimizer = make_optimizer(sharded)
        if case.optimizer == "attached":
            attach_optimizer(sharded, optimizer)
        seen = loop(model if case.inner else sharded, optimizer, case, [share], sharded.parameters, device)
        params = {name: full_tensor(param) for name, param in model.named_parameters()}
    assert list(params) == [name for name, _ in whole.named_parameters()]
    expected = loop(whole, make_optimizer(whole), case, shares, whole.parameters, device)
    mine = [x for i, x in enumerate(expected) if _is_mine(i, case, len(shares), share)]
    trained = [name for name, param in whole.named_parameters() if param.requires_grad]
    return Difference(
        seen=max(abs(a - b) for a, b in zip(seen, mine, strict=True)),
        parameters=max(relative(params[name], param) for name, param in whole.named_parameters()),
        moved=min(relative(whole.get_parameter(name), start.get_parameter(name)) for name in trained),
    )


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.detach() - b.detach()).norm() / b.detach().norm())


def gradients(strategy: str, tp: int, plan: str) -> float:
    """Largest relative difference of a gradient after two micro-batches."""
    case = Case({"data_parallel_sharding_strategy": strategy}, tp=tp, plan=plan)
    mesh = case_mesh(case)
    whole = build_model().to(mesh.device_type)
    model = copy.deepcopy(whole)
    shares = range(mesh.size() // tp)
    with environment():
        sharded = shard(case, model, None)
        for micro in range(2):
            ids = batch(0, micro, dist.get_rank() // tp, mesh.device_type)
            sharded(input_ids=ids, labels=ids).loss.backward()
        found = {name: full_tensor(param.grad) for name, param in model.named_parameters()}
    for micro in range(2):
        for share in shares:
            ids = batch(0, micro, share, mesh.device_type)
            (whole(input_ids=ids, labels=ids).loss / len(shares)).backward()
    return max(relative(found[name], param.grad) for name, param in whole.named_parameters())


def _is_mine(index: int, case: Case, shares: int, mine: int) -> bool:
    """Whether entry ``index`` of the one-process record is one that this rank records too."""
    per_step = shares * case.accumulation + (case.clip is not None)
    place = index % per_step
    return place == shares * case.accumulation or place % shares == mine
