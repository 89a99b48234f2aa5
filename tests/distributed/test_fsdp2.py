"""FSDP2: which modules become units, in models of every shape, and the settings of the seed's function."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from steps import assert_same_gradients, assert_same_step
from tiny_models import batch, build
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from shardwright import ParallelConfig
from shardwright.distributed.parallelizer import apply_fsdp2_sharding_recursively, fsdp2_strategy_parallelize
from shardwright.verify.compare import relative_error
from shardwright.verify.ranks import RankPool, shared_mesh
from shardwright.verify.step import full


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Tree(nn.Module):
    """Runs everything below it in the order of registration."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _run(self, x)


def _run(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    for child in module._modules.values():
        assert child is not None
        x = _run(child, x) if isinstance(child, (nn.ModuleList, nn.ModuleDict)) else child(x)
    return x


def _blocks(count: int) -> nn.ModuleList:
    return nn.ModuleList(Block() for _ in range(count))


def _shared() -> nn.Module:
    block = Block()
    return Tree(first=nn.ModuleList([block, Block()]), second=nn.ModuleList([Block(), block]))


def _frozen() -> nn.Module:
    model = Tree(front=nn.Linear(8, 8), layers=_blocks(3))
    model.layers[0].requires_grad_(False)
    model.layers[1].norm.requires_grad_(False)
    return model


def _mixed() -> nn.Module:
    model = Tree(layers=_blocks(2), head=nn.Linear(8, 4))
    for block in model.layers:
        block.norm.double()
        block.norm.register_forward_pre_hook(lambda module, args: (args[0].double(),))
        block.norm.register_forward_hook(lambda module, args, out: out.float())
    return model


# Name -> (how to make it, the units below the root, those that stay gathered after forward)
TREES: dict[str, tuple[Any, list[str], list[str]]] = {
    "plain": (
        lambda: Tree(front=nn.Linear(8, 8), layers=_blocks(3), head=nn.Linear(8, 4)),
        ["layers.0", "layers.1", "layers.2"],
        ["layers.2"],
    ),
    "one block": (lambda: Tree(layers=_blocks(1)), ["layers.0"], ["layers.0"]),
    "two lists": (
        lambda: Tree(encoder=_blocks(2), decoder=_blocks(2)),
        ["encoder.0", "encoder.1", "decoder.0", "decoder.1"],
        ["encoder.1", "decoder.1"],
    ),
    "nested lists": (
        lambda: Tree(layers=nn.ModuleList([_blocks(2), _blocks(1)])),
        ["layers.0.0", "layers.0.1", "layers.1.0"],
        ["layers.0.1", "layers.1.0"],
    ),
    "pipeline stages": (
        lambda: Tree(layers=nn.ModuleDict({"0": Block(), "1": Block()})),
        ["layers.0", "layers.1"],
        ["layers.1"],
    ),
    "single layers in a list": (
        lambda: Tree(heads=nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)]), layers=_blocks(2)),
        ["layers.0", "layers.1"],
        ["layers.1"],
    ),
    "shared blocks": (_shared, ["first.0", "first.1", "second.0"], ["first.1", "second.0"]),
    "frozen parts": (_frozen, ["layers.0", "layers.1", "layers.2"], ["layers.2"]),
    "mixed dtypes": (
        _mixed,
        ["layers.0", "layers.0.norm", "layers.1", "layers.1.norm"],
        ["layers.1", "layers.1.norm"],
    ),
    "no blocks": (lambda: Tree(a=nn.Linear(8, 8), b=nn.Linear(8, 4)), [], []),
}


def _make(name: str) -> nn.Module:
    torch.manual_seed(1)
    return TREES[name][0]()


def _every_tree() -> None:
    world = dist.get_world_size()
    hybrid = world == 4
    mesh = shared_mesh(ParallelConfig(dp_replicate=2, dp_shard=2) if hybrid else ParallelConfig())
    mesh = mesh["dp_replicate", "dp_shard"] if hybrid else mesh["dp_shard"]
    for name, (_, units, gathered) in TREES.items():
        reference, model = _make(name), _make(name)
        assert apply_fsdp2_sharding_recursively(model, mesh, None) is None
        found = [path for path, module in model.named_modules() if isinstance(module, FSDPModule)]
        assert found == units, name
        fully_shard(model, mesh=mesh)
        x = torch.randn(3, 8, generator=torch.Generator().manual_seed(dist.get_rank()))
        model(x).square().mean().backward()
        del x
        kept = [unit for unit in units if not _is_sharded(model, unit)]
        assert kept == [], name  # backward freed them all
        for rank in range(world):
            x = torch.randn(3, 8, generator=torch.Generator().manual_seed(rank))
            (reference(x).square().mean() / world).backward()
        assert_same_gradients(model, reference, name)
        model(torch.ones(3, 8))
        assert [unit for unit in units if not _is_sharded(model, unit)] == gathered, name


def _is_sharded(model: nn.Module, unit: str) -> bool:
    return all(isinstance(parameter, DTensor) for parameter in model.get_submodule(unit).parameters(recurse=True))


@pytest.mark.parametrize("pool", ["ranks2", "ranks4"])
def test_units_of_every_kind_of_tree(request: pytest.FixtureRequest, pool: str) -> None:
    request.getfixturevalue(pool).run(_every_tree)


def _record(seen: list[torch.dtype]) -> Any:
    return lambda module, args, out: seen.append(out.dtype)


def _default_precision() -> None:
    for config in (ParallelConfig(tp=2, dp_shard=2), ParallelConfig(dp_replicate=2, dp_shard=2)):
        reference, model = build("llama"), build("llama")
        names = [name for name, _ in model.named_parameters()]
        assert fsdp2_strategy_parallelize(model, shared_mesh(config)) is model
        assert [name for name, _ in model.named_parameters()] == names
        seen: list[torch.dtype] = []
        model.model.layers[1].mlp.down_proj.register_forward_hook(_record(seen))
        output = model(**batch(0))
        output.loss.backward()
        reference(**batch(0)).loss.backward()
        assert seen == [torch.bfloat16]
        assert output.logits.dtype == output.loss.dtype == torch.float32
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())  # type: ignore[union-attr]
        close = relative_error(full(model.lm_head.weight.grad), reference.lm_head.weight.grad)
        assert 1e-6 < close < 0.1  # bf16 it was, and right


def test_default_precision_is_bf16_with_fp32_reduction_and_output(ranks4: RankPool) -> None:
    ranks4.run(_default_precision)


def _own_axis_names() -> None:
    mesh = init_device_mesh("cpu", (1, 2, 2), mesh_dim_names=("copies", "data", "tensor"))
    names = {"dp_replicate_mesh_name": "copies", "dp_shard_cp_mesh_name": "data", "tp_mesh_name": "tensor"}
    reference, model = build("qwen3"), build("qwen3")
    fsdp2_strategy_parallelize(
        model, mesh, MixedPrecisionPolicy(), sequence_parallel=True, activation_checkpointing=True, **names
    )
    assert_same_step(model, reference, lambda m: m(**batch(0)).loss, "own names")
    mesh = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("copies", "data", "tensor"))
    reference, model = build("llama"), build("llama")
    fsdp2_strategy_parallelize(model, mesh, MixedPrecisionPolicy(), **names)
    assert_same_step(model, reference, lambda m: m(**batch(0)).loss, "replicas")


def test_axes_with_names_of_their_own(ranks4: RankPool) -> None:
    ranks4.run(_own_axis_names)


def _offloaded() -> None:
    reference, model = build("llama"), build("llama")
    mesh = shared_mesh(ParallelConfig(dp_shard=2))
    fsdp2_strategy_parallelize(model, mesh, MixedPrecisionPolicy(), CPUOffloadPolicy(pin_memory=False))
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())
    assert_same_step(model, reference, lambda m: m(**batch(0)).loss, "offloaded")


def test_offloading(ranks2: RankPool) -> None:
    ranks2.run(_offloaded)
