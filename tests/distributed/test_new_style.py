"""A style is one class and a registry line: everything else finds its facts there."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import pytest
import torch
from tiny_models import batch, build
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from shardwright import ParallelConfig, ParallelPlan
from shardwright.distributed.apply.tensor_parallel import apply_tensor_parallel
from shardwright.distributed.planning.replay_check import why_not_exact
from shardwright.distributed.planning.resolve import resolve
from shardwright.distributed.replay.reading import ModelReading
from shardwright.distributed.runtime import collectives as c
from shardwright.distributed.runtime.forward import Around
from shardwright.distributed.styles import STYLES
from shardwright.distributed.styles.linear import Colwise, features
from shardwright.distributed.styles.traffic import Sent, Site, backward, forward
from shardwright.estimate.traffic import predict_traffic
from shardwright.verify.ranks import RankPool, shared_mesh
from shardwright.verify.step import full


class _RegatheredForward(Around):
    def __init__(self, inner: Around, width: int, mesh: DeviceMesh) -> None:
        self.inner, self.width, self.group = inner, width, c.Group.of(mesh)

    def __call__(self, module, forward, args, kwargs):
        y = self.inner(module, forward, args, kwargs)
        whole = c.gather(y, y.ndim - 1, self.width, self.group, partial_grad=True)
        return c.local_chunk(whole, whole.ndim - 1, self.group)


class Regathered(Colwise):
    """Column-parallel by a detour: the output is gathered and cut again."""

    name = "colwise_regathered"

    def sent(self, site: Site) -> Iterable[Sent]:
        width = features(site.module, out=True)
        return [forward("all_gather", width), backward("reduce_scatter", width)]

    def around(self, module: nn.Module, mesh: DeviceMesh) -> Around:
        return _RegatheredForward(super().around(module, mesh), features(module, out=True), mesh)


PLAN = ParallelPlan({
    "model.layers.*.mlp.gate_proj": "colwise_regathered",
    "model.layers.*.mlp.up_proj": "colwise",
    "model.layers.*.mlp.down_proj": "rowwise",
})  # fmt: skip


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STYLES, Regathered.name, Regathered)


def _worst_error() -> float:
    STYLES[Regathered.name] = Regathered
    try:
        model = build("llama")
        reference = copy.deepcopy(model)
        apply_tensor_parallel(
            model, shared_mesh(ParallelConfig(tp=2, dp_shard=1))["tp"], resolve(ModelReading(model), PLAN, 2)
        )
        for each in (model, reference):
            each(**batch(0)).loss.backward()
        expected = dict(reference.named_parameters())
        cut = model.get_parameter("model.layers.0.mlp.gate_proj.weight")
        assert cut.to_local().numel() * 2 == cut.numel()
        return max(
            ((full(param.grad) - expected[name].grad).abs().max() / expected[name].grad.abs().max()).item()
            for name, param in model.named_parameters()
        )
    finally:
        del STYLES[Regathered.name]


def test_it_runs(ranks2: RankPool) -> None:
    for error in ranks2.run(_worst_error):
        assert error < 1e-5


@pytest.mark.usefixtures("registered")
def test_it_is_replayed_and_counted() -> None:
    model = build("llama")
    reading = ModelReading(model)
    resolved = resolve(reading, PLAN, 2)
    assert why_not_exact(reading, resolved) is None
    assert "model.layers.0.mlp" in resolved.regions
    calls = predict_traffic(reading, resolved, torch.float32.itemsize)["model.layers.0"]
    kinds = [(call.kind, call.backward) for call in calls if call.cause == "model.layers.0.mlp.gate_proj"]
    assert ("all_gather", False) in kinds
    assert ("reduce_scatter", True) in kinds


@pytest.mark.usefixtures("registered")
def test_a_wrong_cut_is_found_by_the_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Regathered, "cut_out", lambda self, width: None)
    reading = ModelReading(build("llama"))
    assert why_not_exact(reading, resolve(reading, PLAN, 2)) is not None
