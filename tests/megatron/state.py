"""What a sharded model holds and says, beside training: run on the ranks."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from training import Case, batch, case_mesh, device_type, environment, make_optimizer, relative, shard
from training import build_model as build_on_cpu
from transformers import LlamaForCausalLM

from shardwright.distributed.apply.megatron_fsdp import (
    Options,
    attach_optimizer,
    copy_full_tensor_,
    full_tensor,
    prepare,
)
from shardwright.distributed.apply.megatron_fsdp.tensors import local_part
from shardwright.distributed.config import ParallelConfig
from shardwright.distributed.precision import PRECISIONS, Precision
from shardwright.errors import RunError, UnsupportedError


def build_model(tied: bool = False) -> LlamaForCausalLM:
    return build_on_cpu(tied).to(device_type())


def step(model: nn.Module, optimizer: Any, number: int, share: int) -> None:
    ids = batch(number, 0, share, device_type())
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: full_tensor(param) for name, param in model.named_parameters()}


def differences(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert list(a) == list(b)
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def attaching_changes_nothing() -> dict[str, Any]:
    """An optimizer with every hyper-parameter set, before and after; and weights, state and gradients."""
    model = build_model()
    with environment():
        sharded = shard(Case(), model, None)
        ids = batch(0, 0, dist.get_rank(), device_type())
        sharded(input_ids=ids, labels=ids).loss.backward()
        optimizer = AdamW(
            [
                {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.3, "name": "matrices"},
                {"params": [p for p in model.parameters() if p.ndim == 1], "lr": 0.5},
            ],
            lr=0.1,
            betas=(0.7, 0.8),
        )
        before = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        weights, params = whole_weights(model), [p for group in optimizer.param_groups for p in group["params"]]
        grads = [full_tensor(p.grad) for p in params]
        attach_optimizer(model, optimizer)
        after = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        return {
            "groups": before == after,
            "same_parameters": all(
                a is b for a, b in zip(params, (p for g in optimizer.param_groups for p in g["params"]), strict=True)
            ),
            "weights": differences(weights, whole_weights(model)),
            "gradients": max(float((full_tensor(p.grad) - g).abs().max()) for p, g in zip(params, grads, strict=True)),
            "state": len(optimizer.state),
        }


def momentum_with_dampening() -> float:
    """SGD whose first step differs from the others: priming it with zeros would show."""
    whole = build_model()
    model = copy.deepcopy(whole)
    options = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1}
    with environment():
        optimizer = SGD(model.parameters(), **options)
        sharded = shard(Case(), model, optimizer)
        for number in range(2):
            step(sharded, optimizer, number, dist.get_rank())
        found = whole_weights(model)
    reference = SGD(whole.parameters(), **options)
    for number in range(2):
        for share in range(dist.get_world_size()):
            ids = batch(number, 0, share, device_type())
            (whole(input_ids=ids, labels=ids).loss / dist.get_world_size()).backward()
        reference.step()
        reference.zero_grad()
    return max(relative(found[name], param) for name, param in whole.named_parameters())


def evaluation_sees_new_weights(strategy: str) -> float:
    """Written weights count at once, also between forwards without a backward."""
    whole = build_model()
    model = copy.deepcopy(whole)
    ids = batch(0, 0, 0, device_type())
    worst = 0.0
    with environment(), torch.no_grad():
        sharded = shard(Case({"data_parallel_sharding_strategy": strategy}), model, None)
        for _ in range(3):
            worst = max(worst, float((sharded(input_ids=ids).logits - whole(input_ids=ids).logits).abs().max()))
            for name, param in model.named_parameters():
                new = torch.randn(param.shape, device=param.device) * 0.1
                copy_full_tensor_(param, new)
                whole.get_parameter(name).copy_(new)
    return worst


def two_forwards_then_two_backwards(strategy: str) -> float:
    whole = build_model()
    model = copy.deepcopy(whole)
    batches = [batch(0, micro, dist.get_rank(), device_type()) for micro in range(2)]
    with environment():
        sharded = shard(Case({"data_parallel_sharding_strategy": strategy}), model, None)
        losses = [sharded(input_ids=ids, labels=ids).loss for ids in batches]
        for loss in losses:
            loss.backward()
        found = {name: full_tensor(param.grad) for name, param in model.named_parameters()}
    for micro in range(2):
        for share in range(dist.get_world_size()):
            ids = batch(0, micro, share, device_type())
            (whole(input_ids=ids, labels=ids).loss / dist.get_world_size()).backward()
    return max(relative(found[name], param.grad) for name, param in whole.named_parameters())


class Branches(nn.Module):
    """One layer takes no part, another only where ``through`` says so."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.sometimes, self.never = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor, through: bool) -> Tensor:
        x = self.always(x).tanh()
        return self.sometimes(x).square().mean() if through else x.square().mean()


def parameters_that_take_no_part(strategy: str, one_unit: bool) -> dict[str, Any]:
    """Only the first of two micro-batches comes to the layer ``sometimes``; then a step with weight decay.

    In a model that is one unit, only rank 0's does.
    """
    torch.manual_seed(0)
    whole = Branches().to(device_type())
    model = copy.deepcopy(whole)
    ranks = dist.get_world_size()
    inputs = torch.randn(ranks, 2, 4, 8).to(device_type())
    options = {"data_parallel_sharding_strategy": strategy, "nvfsdp_unit_modules": None if one_unit else [nn.Linear]}
    with environment():
        sharded = shard(Case(options), model, None)
        optimizer = AdamW(sharded.parameters(), lr=0.1, weight_decay=0.5)
        for micro in range(2):
            sharded(
                inputs[dist.get_rank(), micro], through=micro == 0 and not (one_unit and dist.get_rank())
            ).backward()
        missing = [name for name, param in model.named_parameters() if param.grad is None]
        optimizer.step()
        found = whole_weights(model)
    reference = AdamW(whole.parameters(), lr=0.1, weight_decay=0.5)
    for rank in range(ranks):
        for micro in range(2):
            (whole(inputs[rank, micro], through=micro == 0 and not (one_unit and rank)) / ranks).backward()
    reference.step()
    return {"missing": missing, "weights": max(relative(found[name], p) for name, p in whole.named_parameters())}


def two_models_at_once() -> float:
    """Their forwards before their backwards, with buffers that stay for good: each has its own."""
    wholes = [build_model(), build_model()]
    with torch.no_grad():
        for param in wholes[1].parameters():
            param.mul_(1.5)
    models = [copy.deepcopy(whole) for whole in wholes]
    batches = [batch(0, number, dist.get_rank(), device_type()) for number in range(2)]
    worst = 0.0
    with environment():
        case = Case({"fsdp_double_buffer": True})
        sharded = [shard(case, model, None) for model in models]
        losses = [one(input_ids=ids, labels=ids).loss for one, ids in zip(sharded, batches, strict=True)]
        for loss in losses:
            loss.backward()
        found = [{name: full_tensor(param.grad) for name, param in model.named_parameters()} for model in models]
    for number, whole in enumerate(wholes):
        for share in range(dist.get_world_size()):
            ids = batch(0, number, share, device_type())
            (whole(input_ids=ids, labels=ids).loss / dist.get_world_size()).backward()
        worst = max(worst, *(relative(found[number][name], param.grad) for name, param in whole.named_parameters()))
    return worst


def gradients_exist_on_every_rank() -> tuple[int, int]:
    """How many gradients are missing, and how many shards are empty (there must be some, or this shows nothing)."""
    model = build_model()
    with environment():
        sharded = shard(Case(), model, None)
        ids = batch(0, 0, dist.get_rank(), device_type())
        sharded(input_ids=ids, labels=ids).loss.backward()
        grads = [param.grad for param in model.parameters()]
        for param in model.parameters():  # the shards say themselves where they lie, before any state_dict()
            covered = sum(chunk.sizes.numel() for chunk in param.__create_chunk_list__())
            assert covered == param.to_local().numel()
        return sum(grad is None for grad in grads), sum(grad.to_local().numel() == 0 for grad in grads)


def not_a_number(check: bool) -> str:
    """What a loss that is infinite on the last rank alone leads to."""
    model = build_model()
    with environment():
        sharded = shard(Case({"check_for_nan_in_grad": check}), model, None)
        ids = batch(0, 0, dist.get_rank(), device_type())
        loss = sharded(input_ids=ids, labels=ids).loss
        try:
            (loss * (float("inf") if dist.get_rank() == dist.get_world_size() - 1 else 1.0)).backward()
        except RunError as error:
            message = str(error)
        else:
            message = ""
        sharded.zero_grad()
        sharded(input_ids=ids, labels=ids).loss.backward()  # the model is still good
        assert all(full_tensor(param.grad).isfinite().all() for param in model.parameters())
        return message


def train_and_save(folder: str, tp: int) -> dict[str, Tensor]:
    model = build_model()
    with environment():
        optimizer = make_optimizer(model)
        sharded = shard(Case(tp=tp), model, optimizer)
        step(sharded, optimizer, 0, 0)
        dcp.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint_id=folder)
        step(sharded, optimizer, 1, 0)
        return whole_weights(model)


def load_and_train(folder: str, tp: int, strategy: str) -> dict[str, Tensor]:
    """The step after the saved one, from the checkpoint."""
    model = build_model()
    for param in model.parameters():
        nn.init.zeros_(param)
    with environment():
        optimizer = make_optimizer(model)
        sharded = shard(Case({"data_parallel_sharding_strategy": strategy}, tp=tp), model, optimizer)
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = torch.zeros_like(param)
        optimizer.step()
        optimizer.zero_grad()
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        dcp.load(state, checkpoint_id=folder)
        optimizer.load_state_dict(state["optimizer"])
        step(sharded, optimizer, 1, 0)
        return whole_weights(model)


def from_meta(tp: int, strategy: str, tied: bool) -> dict[str, Any]:
    """A model that is initialised while it is sharded."""
    with torch.device("meta"):
        model = build_on_cpu(tied)
    torch.manual_seed(dist.get_rank())  # ranks that disagree about their random numbers
    options = {"data_parallel_sharding_strategy": strategy, "init_nvfsdp_with_meta_device": True}
    with environment():
        sharded = shard(Case(options, tp=tp, public=True), model, None)
        weights = whole_weights(model)
        ids = batch(0, 0, 0, device_type())
        logits = sharded(input_ids=ids).logits.detach()
    built = build_model(tied)
    built.load_state_dict(weights, strict=not tied)
    mine = weights["model.embed_tokens.weight" if tied else "lm_head.weight"]
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    return {
        "logits": float((logits - built(input_ids=ids).logits).abs().max()),
        "names": list(weights) == [name for name, _ in built.named_parameters()],
        "ranks": float((everyone[0] - everyone[-1]).abs().max()),
        "norm": float(weights["model.norm.weight"].mean()),
        "std": float(weights["model.embed_tokens.weight"].std()),
        "halves": float((weights["model.embed_tokens.weight"][:32] - weights["model.embed_tokens.weight"][32:]).norm()),
    }


def bfloat16_compute(tp: int) -> dict[str, Any]:
    """The engine's own mixed precision against float32."""
    config = ParallelConfig.from_dict({"precision": "bf16", "engine": "megatron_fsdp"})
    whole = build_model()
    model = copy.deepcopy(whole)
    with environment():
        options = Options.from_config(config)
        fields = {name: getattr(options, name) for name in ("precision",)}
        sharded = shard(Case(fields, tp=tp), model, None)
        share = dist.get_rank() // tp
        ids = batch(0, 0, share, device_type())
        output = sharded(input_ids=ids, labels=ids)
        dtypes = (output.loss.dtype, output.logits.dtype)
        output.loss.backward()
        weights = whole_weights(model)
        grads = {name: full_tensor(param.grad) for name, param in model.named_parameters()}
        kept = max(float((weights[name] - param).abs().max()) for name, param in whole.named_parameters())
        stored = {param.dtype for param in model.parameters()} | {param.grad.dtype for param in model.parameters()}
    shares = dist.get_world_size() // tp
    for other in range(shares):
        ids = batch(0, 0, other, device_type())
        (whole(input_ids=ids, labels=ids).loss / shares).backward()
    flat = torch.cat([grads[name].flatten() for name, _ in whole.named_parameters()])
    exact = torch.cat([param.grad.flatten() for param in whole.parameters()])
    return {"kept": kept, "dtypes": dtypes, "stored": stored, "gradients": relative(flat, exact)}


def bfloat16_weights(options: dict[str, bool]) -> dict[str, Any]:
    """A model stored in bfloat16: dtypes, and the gradients of eight micro-batches against their float32 sum."""
    whole = build_model().bfloat16()
    model = copy.deepcopy(whole)
    ranks, micro_batches = dist.get_world_size(), 8
    with environment():
        sharded = shard(Case(options), model, None)
        for micro in range(micro_batches):
            ids = batch(0, micro, dist.get_rank(), device_type())
            sharded(input_ids=ids, labels=ids).loss.backward()
        grads = {name: full_tensor(param.grad).float() for name, param in model.named_parameters()}
        stored = {param.dtype for param in model.parameters()}
    expected = {name: torch.zeros_like(param, dtype=torch.float32) for name, param in whole.named_parameters()}
    for micro in range(micro_batches):
        for share in range(ranks):
            ids = batch(0, micro, share, device_type())
            whole(input_ids=ids, labels=ids).loss.backward()
            for name, param in whole.named_parameters():
                expected[name] += param.grad.float() / ranks
                param.grad = None
    return {"stored": stored, "gradients": max(relative(grads[name], expected[name]) for name in grads)}


def refusal(kind: str) -> str:
    """The message with which ``prepare`` refuses; the model must be untouched."""
    model = build_model()
    before = list(model.parameters())
    mesh = case_mesh(Case())
    optimizer = None
    options: dict[str, Any] = {}
    if kind == "foreign":
        optimizer = AdamW([*model.parameters(), nn.Parameter(torch.zeros(3))])
    elif kind == "used":
        optimizer = AdamW(model.parameters())
        model(input_ids=batch(0, 0, 0, device_type())).logits.sum().backward()
        optimizer.step()
    elif kind == "meta":
        options["init_nvfsdp_with_meta_device"] = True
    elif kind == "no_dims":
        model.scale = nn.Parameter(torch.tensor(1.0))
        before = list(model.parameters())
    elif kind == "float64":
        model.lm_head.double()
    elif kind == "axis":
        options["dp_mesh_name"] = "data"
    with environment():
        try:
            prepare(model, mesh, optimizer, Options(**options))
        except (ValueError, NotImplementedError) as error:
            assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
            return str(error)
    return ""


def refuses_the_cpu() -> str:
    try:
        prepare(build_model(), case_mesh(Case()))
    except UnsupportedError as error:
        return str(error)
    return ""


def kept_bytes(precision: str) -> tuple[int, int, int]:
    """Bytes of this rank's weights, gradients and AdamW averages after a step: the package's buffers and what hangs on
    the parameters."""
    model = build_model()
    wanted = PRECISIONS[precision]
    case = Case(options={"check_for_nan_in_grad": False, "precision": None if wanted == Precision() else wanted})
    with environment():
        sharded = shard(case, model, None)
        optimizer = AdamW(model.parameters(), lr=1e-3)
        ids = batch(0, 0, dist.get_rank(), device_type())
        sharded(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    groups = sharded.param_and_grad_buffer.parameter_groups
    buffers = [buffer for group in groups for buffer in (group.model_weight_buffer, group.main_weight_buffer)]
    weights = [buffer.data for buffer in buffers if buffer is not None]
    gradients = [group.main_grad_buffer.data for group in groups]
    given = [local_part(param.grad) for param in model.parameters() if param.grad is not None]
    own = {gradient.untyped_storage().data_ptr() for gradient in gradients}
    gradients += [part for part in given if part.untyped_storage().data_ptr() not in own]
    averages = [local_part(s[key]) for s in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    return tuple(sum(x.numel() * x.element_size() for x in part) for part in (weights, gradients, averages))
