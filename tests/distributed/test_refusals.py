"""What cannot work is refused on every rank alike, before the model is changed and before anything is sent."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny_models import batch, build
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, PrepareModuleInput, RowwiseParallel
from torch.utils._python_dispatch import TorchDispatchMode

from shardwright import ParallelConfig, parallelize
from shardwright.distributed.parallelizer import fsdp2_strategy_parallelize
from shardwright.errors import PlanError
from shardwright.verify.ranks import RankPool, shared_mesh


class Unknown(ParallelStyle):
    """A style that its user wrote."""

    def _apply(self, module: nn.Module, device_mesh: Any) -> nn.Module:
        return module


BLOCK = "model.layers.*"
PLANS: dict[str, tuple[dict[str, Any], str]] = {
    "a glob that matches nothing": ({f"{BLOCK}.self_attn.q_porj": "colwise"}, "q_porj.*Did you mean.*q_proj"),
    "a glob for another model": ({"transformer.h.*.attn.c_attn": "colwise"}, "c_attn.*LlamaForCausalLM"),
    "a torch style that matches nothing": ({"model.layer.*.mlp.up_proj": ColwiseParallel()}, "matches no module"),
    "an unknown style": ({f"{BLOCK}.mlp.up_proj": "colwize"}, "colwize.*Known styles"),
    "a torch style without a counterpart": ({f"{BLOCK}.mlp": Unknown()}, "Unknown"),
    "a layout for a module that is not there": (
        {f"{BLOCK}.mpl": PrepareModuleInput(input_layouts=None, desired_input_layouts=None)},
        "mpl.*Did you mean.*mlp",
    ),
    "a linear style on a norm": ({"model.norm": "rowwise"}, "rowwise.*model.norm"),
    "an embedding style on a linear": ({"lm_head": "embedding_rowwise"}, "embedding_rowwise.*lm_head"),
    "a reader without its writer": ({f"{BLOCK}.mlp.up_proj": "colwise"}, "does not compute what LlamaForCausalLM"),
    "an object that is no style": ({f"{BLOCK}.mlp.up_proj": 3}, "up_proj"),
}


class Collectives(TorchDispatchMode):
    """Notes the name of every collective, of whatever kind (``CommDebugMode`` knows some)."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("_c10d_functional", "c10d"):
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def _state(model: nn.Module) -> list[Any]:
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    modules = [(name, type(module), sorted(module.__dict__)) for name, module in model.named_modules()]
    hooks = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]
    return [{name: (id(tensor), tensor._version) for name, tensor in tensors.items()}, modules, hooks]


def _bad_plans() -> list[str]:
    messages = []
    mesh = shared_mesh(ParallelConfig(tp=2))
    for name, (plan, pattern) in PLANS.items():
        model = build("llama")
        before, values = _state(model), [parameter.detach().clone() for parameter in model.parameters()]
        for sequence_parallel in (False, True):
            with Collectives() as seen, pytest.raises(PlanError, match=pattern) as caught:
                fsdp2_strategy_parallelize(model, mesh, sequence_parallel=sequence_parallel, tp_shard_plan=plan)
            assert not seen.names, name
            assert _state(model) == before, name
            assert all(torch.equal(a, b) for a, b in zip(model.parameters(), values, strict=True)), name
        messages.append(str(caught.value))
        model(**batch(0)).loss.backward()  # still a working model
    return messages


def test_bad_plans(ranks2: RankPool) -> None:
    first, second = ranks2.run(_bad_plans)
    assert first == second
    assert all("\n" not in message for message in first)  # one paragraph


def _too_many_ranks() -> None:
    model = build("llama", num_attention_heads=3, num_key_value_heads=3, hidden_size=24)
    before = _state(model)
    config = ParallelConfig(tp=2)
    with Collectives() as seen, pytest.raises(AssertionError, match=r"3 attention heads.*tp=2"):
        parallelize(model, config, shared_mesh(config))
    assert not seen.names
    assert _state(model) == before
    parallel = build("llama")
    parallelize(parallel, config, shared_mesh(config))
    with pytest.raises(PlanError, match="is parallelized already"):
        parallelize(parallel, config, shared_mesh(config))


def test_heads_and_a_second_call(ranks2: RankPool) -> None:
    ranks2.run(_too_many_ranks)


def _parameters_that_would_lose_something() -> list[str]:
    messages = []
    for config in (ParallelConfig(tp=2), ParallelConfig(dp_shard=2)):
        hooked, after, scalar = (build("llama") for _ in range(3))
        hooked.model.norm.weight.register_hook(lambda grad: 2 * grad)
        after.lm_head.weight.register_post_accumulate_grad_hook(lambda param: None)
        scalar.register_parameter("scale", nn.Parameter(torch.tensor(2.0)))
        models = {"model.norm.weight has a gradient hook": hooked, "lm_head.weight has a gradient hook": after}
        models |= {"scale has no dim": scalar} if config.tp == 1 else {}
        for pattern, model in models.items():
            before = _state(model)
            with Collectives() as seen, pytest.raises(PlanError, match=pattern) as caught:
                parallelize(model, config, shared_mesh(config))
            assert not seen.names
            assert _state(model) == before
            messages.append(str(caught.value))
    return messages


def test_parameters_that_sharding_would_strip(ranks2: RankPool) -> None:
    first, second = ranks2.run(_parameters_that_would_lose_something)
    assert first == second


def _different(what: str, config: ParallelConfig) -> str:
    odd = dist.get_rank() == dist.get_world_size() - 1
    model = build("llama", **({"intermediate_size": 52} if what == "shapes" and odd else {}))
    if what == "weights" and odd:
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-3
    if what == "dtypes" and odd:
        model.to(torch.bfloat16)
    if what == "frozen" and odd:
        model.model.embed_tokens.requires_grad_(False)
    if what == "plan" and odd:
        model._tp_plan = {f"{BLOCK}.mlp.up_proj": "replicate"}
    before = _state(model)
    with pytest.raises(PlanError, match=f"ank.*{dist.get_world_size() - 1}") as caught:
        parallelize(model, config, shared_mesh(config))
    assert _state(model) == before
    return str(caught.value)


@pytest.mark.parametrize("what", ["weights", "shapes", "dtypes", "frozen", "plan"])
@pytest.mark.parametrize("config", [ParallelConfig(tp=2, dp_shard=2), ParallelConfig(tp=2, dp_replicate=2)])
def test_ranks_that_hold_different_models(ranks4: RankPool, what: str, config: ParallelConfig) -> None:
    messages = ranks4.run(_different, what, config)
    assert len(set(messages)) == 1
    if what == "weights":
        assert "model.layers.1.mlp.up_proj.weight" in messages[0]


def _not_raised_for_equal_models() -> None:
    config = ParallelConfig(tp=2, dp_shard=2)
    parallelize(build("llama"), config, shared_mesh(config))
    plan: dict[str, Any] = {f"{BLOCK}.mlp.{name}_proj": ColwiseParallel() for name in ("gate", "up")}
    plan[f"{BLOCK}.mlp.down_proj"] = RowwiseParallel()
    fsdp2_strategy_parallelize(build("llama"), shared_mesh(config), tp_shard_plan=plan)


def test_equal_models_and_good_plans_are_not_refused(ranks4: RankPool) -> None:
    ranks4.run(_not_raised_for_equal_models)
