"""MLPs in tiles, and inputs of recomputed blocks in host memory: exact, and what is in memory meanwhile."""

from __future__ import annotations

import copy
import gc
import re
from typing import Any

import pytest
import torch
from live_bytes import LiveBytes
from steps import assert_same, assert_same_gradients, assert_same_parameters
from tiny_models import EXPECTED_SHARE, assert_exact, batch, build, measure

from shardwright import ParallelConfig, parallelize
from shardwright.distributed.apply.activation_checkpointing import _Checkpointed
from shardwright.distributed.apply.offload import HostMemory
from shardwright.distributed.planning.mlps import mlp_names
from shardwright.distributed.replay.reading import ModelReading
from shardwright.distributed.runtime.forward import arounds
from shardwright.errors import ConfigError
from shardwright.verify.ranks import RankPool, shared_mesh

FULL = {"activation_checkpointing": "full", "offload_activations": True}
SETTINGS: dict[str, dict[str, Any]] = {
    "mlp": {"mlp_tiles": 3},
    "mlp, recomputed": {"mlp_tiles": 4, "activation_checkpointing": "full"},
    "offload": FULL,
    "every second": {**FULL, "activation_checkpointing": "every_2"},
    "all": {**FULL, "mlp_tiles": 2, "loss_tiles": 3},
    "all, compiled": {**FULL, "mlp_tiles": 2, "loss_tiles": 3, "compile": "aot_eager"},
}
WAYS: dict[str, dict[str, Any]] = {
    "tp": {"tp": 2},
    "tp+sp": {"tp": 2, "sequence_parallel": True},
    "fsdp2": {"dp_shard": 2},
}
WAYS_OF_FOUR: dict[str, dict[str, Any]] = {
    "tp x fsdp2": {"tp": 2, "dp_shard": 2},
    "tp+sp x fsdp2": {"tp": 2, "dp_shard": 2, "sequence_parallel": True},
}
# Norms around the MLP, biases and another layer class, a packed projection.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"mlp_bias": True},
    "gemma2": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "phi3": {},
}


def _compare(family: str, config: dict[str, Any], length: int = 15) -> None:
    """Two steps of two micro-batches against one process, evaluations in between."""
    parallel = ParallelConfig(**config)
    mesh = shared_mesh(parallel)
    ranks, mine = mesh["dp"].size(), mesh["dp"].get_local_rank()
    reference = build(family, **FAMILIES[family])
    model = parallelize(copy.deepcopy(reference), parallel, mesh)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (model, reference)]
    for step in range(2):
        with torch.no_grad():
            data = batch(77, length=2 * length)
            assert_same(model(**data).loss, reference(**data).loss, "evaluation")
        for micro in range(2):
            for rank in range(ranks):
                data = batch(100 * step + 10 * rank + micro, length=length)
                expected = reference(**data).loss
                (expected / ranks).backward()
                if rank == mine:
                    loss = model(**data).loss
                    assert_same(loss, expected, "loss")
                    loss.backward()
        assert_same_gradients(model, reference)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert_same_parameters(model, reference)


# A setting by itself where ranks differ most; elsewhere all of them together.
ALONE = {("tp+sp", "mlp"), ("fsdp2", "mlp, recomputed"), ("tp", "offload"), ("fsdp2", "every second")}


@pytest.mark.parametrize(
    ("way", "setting"),
    [
        pytest.param(way, setting, marks=() if "all" in setting or (way, setting) in ALONE else pytest.mark.sweep)
        for way in WAYS
        for setting in SETTINGS
    ],
)
def test_settings(ranks2: RankPool, way: str, setting: str) -> None:
    ranks2.run(_compare, "llama", {**WAYS[way], **SETTINGS[setting]})


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "llama"])
@pytest.mark.parametrize("way", [pytest.param("tp", marks=pytest.mark.sweep), "tp+sp"])
def test_families(ranks2: RankPool, family: str, way: str) -> None:
    ranks2.run(_compare, family, {**WAYS[way], **SETTINGS["all"]})


@pytest.mark.parametrize("length", [2, 3, pytest.param(5, marks=pytest.mark.sweep), 16])
@pytest.mark.parametrize("way", [pytest.param("tp", marks=pytest.mark.sweep), "tp+sp"])
def test_lengths(ranks2: RankPool, way: str, length: int) -> None:
    """Sequences shorter than the tiles, and such as the ranks do not divide."""
    report = measure(ranks2, "llama", ParallelConfig(**WAYS[way], **SETTINGS["mlp"]), length=length)
    assert report.exact, report


@pytest.mark.parametrize("way", [pytest.param("tp x fsdp2", marks=pytest.mark.sweep), "tp+sp x fsdp2"])
def test_on_four_ranks(ranks4: RankPool, way: str) -> None:
    assert_exact(measure(ranks4, "llama", ParallelConfig(**WAYS_OF_FOUR[way], **SETTINGS["all"])), EXPECTED_SHARE)


CONTEXT = {"cp": 2, "dp_shard": 1}


def test_with_context_parallelism(ranks2: RankPool) -> None:
    """Tiles of a rank's part of the sequence; 5 positions are fewer than there are tiles on the two ranks."""
    ranks2.run(_compare, "llama", {**CONTEXT, **SETTINGS["all"]}, 5)
    ranks2.run(_compare, "llama", {**CONTEXT, **SETTINGS["all, compiled"]})


def test_with_context_and_tensor_parallelism(ranks4: RankPool) -> None:
    ranks4.run(_compare, "gemma2", {**CONTEXT, **WAYS["tp+sp"], **SETTINGS["all, compiled"]})


def _uneven_data_parallel_ranks() -> None:
    """Data-parallel ranks with batches of other lengths make the same collectives among them."""
    parallel = ParallelConfig(tp=2, dp_shard=2, **SETTINGS["all"])
    mesh = shared_mesh(parallel)
    reference, mine = build("llama"), mesh["dp"].get_local_rank()
    model = parallelize(copy.deepcopy(reference), parallel, mesh)
    for rank, length in enumerate((15, 2)):
        data = batch(rank, length=length)
        expected = reference(**data).loss
        (expected / 2).backward()
        if rank == mine:
            loss = model(**data).loss
            assert_same(loss, expected, "loss")
            loss.backward()
    assert_same_gradients(model, reference)


def test_uneven_data_parallel_ranks(ranks4: RankPool) -> None:
    ranks4.run(_uneven_data_parallel_ranks)


# Memory


LENGTH, WIDE, BLOCKS = 128, 1004, 8
STREAM = 2 * LENGTH * 32 * 4  # bytes of the residual stream


class DeviceBytes(LiveBytes):
    """Live bytes without those that wait in host memory, which on a CPU is the same memory."""

    def __init__(self, host: HostMemory | None, wide: int) -> None:
        super().__init__(wide)
        self.host = host
        self.device_peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self.device_peak = max(self.device_peak, self.now - (0 if self.host is None else self.host.held))
        return result


def _memory(config: dict[str, Any]) -> tuple[int, int]:
    """The highest number of bytes on the device in a step, and the elements of the widest tensor in an MLP."""
    parallel = ParallelConfig(**config)
    sizes = {"intermediate_size": WIDE, "num_hidden_layers": BLOCKS, "max_position_embeddings": LENGTH}
    model: Any = parallelize(build("llama", **sizes), parallel, shared_mesh(parallel))
    data = batch(0, length=LENGTH)
    model(**data).loss.backward()
    checkpoints = [around for around in arounds(model.model.layers[0]) if isinstance(around, _Checkpointed)]
    host = checkpoints[0].host if checkpoints else None
    gc.collect()
    with DeviceBytes(host, WIDE // parallel.tp) as live:
        model(**data).loss.backward()
    if host is not None:
        assert host.held == 0
    return live.device_peak, live.widest


@pytest.mark.parametrize("way", list(WAYS))
def test_mlps_are_never_whole(ranks2: RankPool, way: str) -> None:
    whole, tiled = (ranks2.run(_memory, {**WAYS[way], "mlp_tiles": tiles}) for tiles in (1, 8))
    width = WIDE // WAYS[way].get("tp", 1)
    for (peak, widest), (tiled_peak, tiled_widest) in zip(whole, tiled, strict=True):
        assert widest == 2 * LENGTH * width
        assert tiled_widest == 2 * LENGTH // 8 * width
        # Of every block, backward keeps three of them without tiles (the product and what it is made of), else none.
        assert peak - tiled_peak > 3 * (BLOCKS - 1) * 2 * LENGTH * width * 4


@pytest.mark.parametrize("way", list(WAYS))
def test_inputs_of_blocks_wait_on_the_host(ranks2: RankPool, way: str) -> None:
    config = {**WAYS[way], "activation_checkpointing": "full", "mlp_tiles": 8}
    kept, moved = (ranks2.run(_memory, {**config, "offload_activations": offload}) for offload in (False, True))
    stream = STREAM // (2 if "sequence_parallel" in config else 1)
    for (peak, _), (moved_peak, _) in zip(kept, moved, strict=True):
        assert peak - moved_peak > (BLOCKS - 2) * stream


def test_a_copy_has_saved_nothing() -> None:
    host = HostMemory()
    x = torch.ones(4, requires_grad=True)
    with host.keeps():
        y = (x * x).sum()
    assert host.held == 2 * x.nbytes
    assert copy.deepcopy(host).held == 0
    y.backward()
    assert x.grad is not None
    assert torch.equal(x.grad, 2 * torch.ones(4))
    del y
    assert host.held == 0


# What is decided


@pytest.mark.parametrize(
    ("family", "found"),
    [("llama", "model.layers.1.mlp"), ("gpt2", "transformer.h.1.mlp"), ("gemma2", "model.layers.1.mlp"),
     ("mixtral", None), ("opt", None)],
)  # fmt: skip
def test_which_parts_are_mlps(family: str, found: str | None) -> None:
    names = mlp_names(ModelReading(build(family)))
    assert names == ([] if found is None else [found.replace("1", "0"), found])


def _mixtral() -> str:
    config = ParallelConfig(tp=2, mlp_tiles=4)
    with pytest.raises(ConfigError) as caught:
        parallelize(build("mixtral"), config, shared_mesh(config))
    return str(caught.value)


def test_a_model_without_such_parts_is_refused(ranks2: RankPool) -> None:
    for message in ranks2.run(_mixtral):
        assert message.startswith("mlp_tiles is 4, but no block of MixtralForCausalLM")


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({"mlp_tiles": 2, "activation_checkpointing": "selective"}, "keeps the matrix products"),
        ({"offload_activations": True}, "activation_checkpointing 'none' recomputes none"),
        ({"offload_activations": True, "activation_checkpointing": "selective"}, "recomputes none from its input"),
        ({"offload_activations": 1}, "offload_activations is 1"),
        ({"mlp_tiles": True}, "mlp_tiles is True"),
        ({"mlp_tiles": 2, "engine": "megatron_fsdp"}, "mlp_tiles (2) is for the engine fsdp2"),
    ],
)
def test_settings_that_do_not_fit_together(data: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(named)):
        ParallelConfig.from_dict(data)
