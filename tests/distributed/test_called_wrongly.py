"""``parallelize`` called too late, twice, or with what contradicts itself: refused before anything is changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loops import loss, train
from steps import assert_same_parameters
from tiny_models import build
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

from shardwright import ParallelConfig, parallelize
from shardwright.distributed.parallelizer import fsdp2_strategy_parallelize
from shardwright.distributed.precision import Precision
from shardwright.errors import ConfigError, PlanError
from shardwright.verify.ranks import RankPool, shared_mesh

TP, FSDP = ParallelConfig(tp=2), ParallelConfig(dp_shard=2)
OF_TWO = (TP, FSDP, ParallelConfig(dp_replicate=2, dp_shard=1))
OF_FOUR = (TP.with_(dp_shard=2, sequence_parallel=True), FSDP.with_(dp_replicate=2))


def _optimizer_first(configs: tuple[ParallelConfig, ...]) -> None:
    for config in configs:
        model, other = build("llama"), build("llama")
        optimizer = torch.optim.AdamW(model.parameters())
        schedule = LambdaLR(optimizer, lambda step: 1.0)
        others = torch.optim.SGD(other.parameters(), lr=0.1)
        with pytest.raises(PlanError, match=r"\(AdamW\) was made before parallelize. It holds 21 of the model's"):
            parallelize(model, config, shared_mesh(config))
        assert not any(isinstance(param, DTensor) for param in model.parameters()), "nothing is changed"
        optimizer.cycle = [optimizer]  # type: ignore[attr-defined]
        del optimizer, schedule
        parallelize(model, config, shared_mesh(config))
        assert train(model) == pytest.approx(train(build("llama")), abs=1e-6)
        others.step()


@pytest.mark.parametrize("pool", ["ranks2", "ranks4"])
def test_an_optimizer_made_before(pool: str, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue(pool).run(_optimizer_first, OF_TWO if pool == "ranks2" else OF_FOUR)


class Momentum:
    """An optimizer of its own kind."""

    def __init__(self, model: nn.Module) -> None:
        self.params = list(model.parameters())

    @torch.no_grad()
    def step(self) -> None:
        for param in self.params:
            if param.grad is not None:
                param.add_(param.grad, alpha=-0.1)


def _lists_from_before(configs: tuple[ParallelConfig, ...]) -> None:
    for config in configs:
        reference, model = build("llama"), build("llama")
        optimizer, params = Momentum(model), list(model.parameters())
        before = [param.detach().clone() for param in params]
        parallelize(model, config, shared_mesh(config))
        loss(model).backward()
        for use in (optimizer.step, lambda params=params: nn.utils.clip_grad_norm_(params, 1.0)):
            with pytest.raises(PlanError, match=r"model\.embed_tokens\.weight is no longer a parameter of the model"):
                use()
        assert all(map(torch.equal, params, before)), "their values can be read"
        assert_same_parameters(model, reference)


def test_lists_of_parameters_from_before(ranks2: RankPool) -> None:
    ranks2.run(_lists_from_before, OF_TWO)


def _twice() -> None:
    mesh: Any
    for config in OF_TWO:
        model = parallelize(build("llama"), config, shared_mesh(config))
        wrapper = nn.Sequential(model)
        for each in (model, wrapper):
            with pytest.raises(PlanError, match=r"LlamaForCausalLM\)? is parallelized already"):
                parallelize(each, config, shared_mesh(config))
        assert train(model) == pytest.approx(train(build("llama")), abs=1e-6)
    mesh = shared_mesh(FSDP)["dp_shard"]
    with pytest.raises(PlanError, match="is parallelized already"):
        parallelize(fully_shard(build("llama"), mesh=mesh), FSDP, shared_mesh(FSDP))
    with pytest.raises(PlanError, match="is parallelized already"):
        fsdp2_strategy_parallelize(model, shared_mesh(FSDP))


def test_twice(ranks2: RankPool) -> None:
    ranks2.run(_twice)


def _wrapped() -> None:
    for config in (TP, FSDP):
        wrapped = DistributedDataParallel(build("llama"))
        with pytest.raises(PlanError, match=r"wrapped in DistributedDataParallel.*Pass the model inside, model.module"):
            parallelize(wrapped, config, shared_mesh(config))
        del wrapped._modules["module"]  # its hooks know the process group, which the next test uses


def test_a_wrapped_model(ranks2: RankPool) -> None:
    ranks2.run(_wrapped)


def _contradictions() -> None:
    model = build("llama")
    for config, mesh, message in (
        (ParallelConfig(tp=8), TP, r"The config says tp=8, but the mesh has .* x tp \(2\)"),
        (
            ParallelConfig(),
            TP,
            r"says tp=1, but the mesh has dp_replicate \(1\) x .* x tp \(2\)",
        ),
        (ParallelConfig(dp_replicate=2, dp_shard=1), FSDP, r"says dp_replicate=2, dp_shard=1, but"),
    ):
        with pytest.raises(ConfigError, match=message):
            parallelize(model, config, shared_mesh(mesh))
    assert not any(isinstance(param, DTensor) for param in model.parameters())
    parallelize(model, FSDP.with_(dp_shard=-1), shared_mesh(FSDP))


def test_degrees_that_contradict_the_mesh(ranks2: RankPool) -> None:
    ranks2.run(_contradictions)


def test_a_config_that_is_none() -> None:
    config: Any = {"tp": 2}
    with pytest.raises(ConfigError, match=r"config is a dict; it must be a shardwright.ParallelConfig"):
        parallelize(nn.Linear(2, 2), config)


def test_fields_that_do_not_exist() -> None:
    fields: Any = {"tpp": 2}
    with pytest.raises(ConfigError, match=r"Unknown key\(s\) 'tpp' for ParallelConfig. Known: .*context_method, cp"):
        ParallelConfig(**fields)
    with pytest.raises(ConfigError, match="Unknown key"):
        ParallelConfig().with_(**fields)
    with pytest.raises(ConfigError, match=r"'params' for Precision. Known: output, param, reduce"):
        Precision(**{"params": "float32"})
