"""Meshes at any size, on a fake process group: axes, flattened axes, neighbours, and what is refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from math import prod
from unittest.mock import patch

import pytest
import torch
from tiny_models import batch, build
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from transformers import LlamaConfig, LlamaForCausalLM

from shardwright import ParallelConfig, make_mesh, parallelize
from shardwright.distributed.axes import NAMES
from shardwright.distributed.config import Degrees
from shardwright.distributed.mesh import axis, data_parallel_mesh
from shardwright.distributed.parallelizer import fsdp2_strategy_parallelize
from shardwright.errors import ConfigError, UnsupportedError
from shardwright.verify.ranks import RankPool, shared_mesh

FLATTENED = {"dp": (0, 1), "dp_shard_cp": (1, 2), "dp_cp": (0, 1, 2)}


@pytest.mark.parametrize("rank", [0, 77, 255])
@pytest.mark.parametrize("sizes", [(2, 16, 1, 8), (1, 64, 2, 2), (4, 4, 4, 4), (256, 1, 1, 1), (1, 1, 1, 256)])
def test_axes_of_256_ranks(fake_world: Callable[..., None], sizes: tuple[int, int, int, int], rank: int) -> None:
    fake_world(256, rank)
    mesh = make_mesh(Degrees(*sizes), "cpu")
    assert mesh.mesh_dim_names == NAMES
    assert tuple(mesh.shape) == sizes
    assert [mesh[name].size() for name in NAMES] == list(sizes)
    everyone = torch.arange(256).view(sizes)
    here = (everyone == rank).nonzero()[0].tolist()
    assert list(mesh.get_coordinate() or ()) == here
    for name, dims in FLATTENED.items():
        size = prod(sizes[dim] for dim in dims)
        assert mesh[name].size() == size, name
        place = tuple(slice(None) if dim in dims else here[dim] for dim in range(4))
        assert mesh[name].mesh.flatten().tolist() == everyone[place].flatten().tolist(), name


def test_neighbouring_ranks_share_a_tensor_parallel_group(fake_world: Callable[..., None]) -> None:
    fake_world(1024, 517)
    mesh = make_mesh(ParallelConfig(dp_replicate=4, tp=8), "cpu")
    assert mesh["dp_shard"].size() == 32
    assert mesh["tp"].mesh.tolist() == list(range(512, 520))


def test_a_world_of_one(fake_world: Callable[..., None]) -> None:
    fake_world(1)
    mesh = make_mesh(ParallelConfig(), "cpu")
    assert [mesh[name].size() for name in (*NAMES, *FLATTENED)] == [1] * 7
    model = build("llama")
    names = [name for name, _ in model.named_parameters()]
    assert parallelize(model, ParallelConfig(), mesh) is model
    assert [name for name, _ in model.named_parameters()] == names


def test_megatron_fsdp_refuses_split_sequences(fake_world: Callable[..., None]) -> None:
    fake_world(2)
    with pytest.raises(UnsupportedError, match=r"cp=2: .* not offered with engine: megatron_fsdp"):
        parallelize(build("llama"), ParallelConfig(cp=2, engine="megatron_fsdp"))


def test_degrees_that_do_not_fit_show_every_factor(fake_world: Callable[..., None]) -> None:
    fake_world(12)
    with pytest.raises(ConfigError, match=r"dp_replicate \(2\) x dp_shard \(3\) x cp \(1\) x tp \(4\) = 24.* is 12"):
        make_mesh(ParallelConfig(dp_replicate=2, dp_shard=3, tp=4), "cpu")
    with pytest.raises(ConfigError, match=r"tp \(5\) = 5 does not divide the world size 12"):
        make_mesh(ParallelConfig(tp=5), "cpu")
    with pytest.raises(ConfigError, match=r"8, .*12"):
        make_mesh(Degrees(1, 2, 1, 4), "cpu")


def test_no_process_group() -> None:
    with pytest.raises(ConfigError, match="init_process_group"):
        make_mesh(ParallelConfig(), "cpu")


def test_data_parallel_axes(fake_world: Callable[..., None]) -> None:
    fake_world(16)
    mesh = make_mesh(Degrees(1, 8, 1, 2), "cpu")
    assert data_parallel_mesh(mesh, "dp_replicate", "dp_shard_cp").ndim == 1
    hybrid = make_mesh(Degrees(2, 4, 1, 2), "cpu")
    assert tuple(data_parallel_mesh(hybrid, "dp_replicate", "dp_shard_cp").shape) == (2, 4)
    with pytest.raises(ConfigError, match="'tensor'"):
        axis(mesh, "tensor")


def test_a_mesh_without_the_axis_that_was_named(fake_world: Callable[..., None]) -> None:
    fake_world(4)
    mesh = init_device_mesh("cpu", (1, 2, 2), mesh_dim_names=("copies", "data", "tensor"))
    model = build("llama")
    before = dict(model.named_parameters())
    with pytest.raises(ConfigError, match="no axis 'dp_"):
        fsdp2_strategy_parallelize(model, mesh)
    with pytest.raises(ConfigError, match="no axis 'tp'"):
        fsdp2_strategy_parallelize(model, mesh, dp_replicate_mesh_name="copies", dp_shard_cp_mesh_name="data")
    assert all(value is before[name] for name, value in model.named_parameters())


def test_local_shapes_on_512_ranks(fake_world: Callable[..., None]) -> None:
    """A model on meta, cut over 8 tensor-parallel and 32 sharding ranks, each of which holds 1/256 of every matrix."""
    fake_world(512, 300)
    config = LlamaConfig(
        vocab_size=32000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=2, num_attention_heads=16,
        num_key_value_heads=8,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    parallelize(model, ParallelConfig(dp_replicate=2, tp=8), make_mesh(ParallelConfig(dp_replicate=2, tp=8), "cpu"))
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor), name
        assert parameter.is_meta, name
        share = 256 if parameter.ndim == 2 else 32
        assert parameter.to_local().numel() * share == parameter.numel(), name


def test_axes_of_one_rank_may_be_missing(fake_world: Callable[..., None]) -> None:
    fake_world(8)
    two = init_device_mesh("cpu", (4, 2), mesh_dim_names=("data", "model"))
    model = fsdp2_strategy_parallelize(build("llama"), two, dp_shard_cp_mesh_name="data", tp_mesh_name="model")
    weight = model.model.layers[0].mlp.up_proj.weight
    assert (weight.device_mesh.ndim, weight.to_local().shape) == (2, (6, 32))
    one = init_device_mesh("cpu", (8,), mesh_dim_names=("dp_shard_cp",))
    weight = fsdp2_strategy_parallelize(build("llama"), one).lm_head.weight
    assert (weight.device_mesh.ndim, weight.placements[0].is_shard()) == (1, True)


@pytest.mark.parametrize(
    ("sizes", "names", "message"),
    [
        (
            (2, 2, 2),
            ("pp", "dp_shard_cp", "tp"),
            r"8 ranks.*dp_shard_cp \(2\) x tp \(2\), have 4.*no axis 'dp_replicate'",
        ),
        ((4, 2), ("dp", "tp"), r"8 ranks.*tp \(2\), have 2.*no axis 'dp_replicate' and no axis 'dp_shard_cp'"),
        ((4, 2), ("dp_shard_cp", "tensor"), r"8 ranks.*have 4.*no axis 'tp'"),
        ((4, 2), None, r"8 ranks.*none of them.*Pass the names"),
    ],
)
def test_an_axis_that_nothing_uses(
    fake_world: Callable[..., None], sizes: tuple[int, ...], names: tuple[str, ...] | None, message: str
) -> None:
    """Ranks along it would each train a model of their own."""
    fake_world(8)
    with pytest.raises(ConfigError, match=message):
        fsdp2_strategy_parallelize(build("llama"), init_device_mesh("cpu", sizes, mesh_dim_names=names))


def test_a_foreign_mesh_for_parallelize(fake_world: Callable[..., None]) -> None:
    fake_world(4)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    with pytest.raises(ConfigError, match=r"no axis 'dp_cp'.*make_mesh"):
        parallelize(build("llama"), ParallelConfig(tp=2), mesh)


def _default_device() -> str:
    with patch.object(torch.cuda, "is_available", return_value=True):
        return make_mesh(ParallelConfig(dp_shard=2)).device_type


def test_ranks_joined_with_gloo_compute_on_the_cpu(ranks2: RankPool) -> None:
    """Also where there is a GPU: NCCL is what joins ranks on GPUs."""
    assert ranks2.run(_default_device) == ["cpu", "cpu"]


def _collectives_of_clipping() -> dict[str, int]:
    config = ParallelConfig(tp=2, dp_shard=2)
    model = parallelize(build("llama"), config, shared_mesh(config))
    model(**batch(0)).loss.backward()
    with CommDebugMode() as counter:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0).full_tensor()
    return {str(name): count for name, count in counter.get_comm_counts().items()}


def test_a_norm_over_both_axes_is_one_sum(ranks4: RankPool) -> None:
    assert ranks4.run(_collectives_of_clipping) == [{"c10d_functional.all_reduce": 1}] * 4


def test_slicing_does_not_warn(fake_world: Callable[..., None]) -> None:
    fake_world(8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = ParallelConfig(dp_replicate=2, dp_shard=2, tp=2)
        parallelize(build("llama"), config, make_mesh(config, "cpu"))
