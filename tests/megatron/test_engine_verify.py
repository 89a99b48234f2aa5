"""``shardwright verify --engine megatron_fsdp``: the proof, run with the stand-in, and what it says without a GPU."""

from __future__ import annotations

import pytest
import torch
from click.testing import CliRunner
from standin import cuda_standin
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from training import environment

from shardwright.api import parallelize
from shardwright.cli import main
from shardwright.distributed.config import ParallelConfig
from shardwright.errors import ConfigError, UnsupportedError
from shardwright.verify import verify
from shardwright.verify.compare import Report
from shardwright.verify.public import case_of
from shardwright.verify.ranks import RankPool
from shardwright.verify.run import Case, run_case


def in_environment(case: Case) -> Report:
    with environment():
        return run_case(case)


def report(pool: RankPool, model: str, **config: object) -> Report:
    case = case_of(model, ParallelConfig(engine="megatron_fsdp", **config), accumulate=2)  # type: ignore[arg-type]
    return pool.run(in_environment, case)[0]


@pytest.mark.parametrize("model", ["qwen3", "phi3", "gpt2"])
def test_models_are_exact(ranks4: RankPool, model: str) -> None:
    found = report(ranks4, model, tp=2, dp_shard=2)
    assert found.exact, found
    assert (found.world_size, found.sharded_fraction > 0.5) == (4, True)


def planted(model: nn.Module, config: ParallelConfig, mesh: DeviceMesh) -> nn.Module:
    with torch.no_grad():
        next(model.parameters()).mul_(1.001)
    return parallelize(model, config, mesh)


def test_a_mistake_is_found(ranks2: RankPool) -> None:
    """Without the second opinion in float64, for which the engine has no buffers."""
    case = case_of("llama", ParallelConfig(engine="megatron_fsdp", dp_shard=2), parallelize=planted)
    found: Report = ranks2.run(in_environment, case)[0]
    assert not found.exact
    assert "buffers for float32" in str(found.float64_failure)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_one_paragraph() -> None:
    done = CliRunner().invoke(main, ["verify", "llama", "--engine", "megatron_fsdp"])
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith("Error: Megatron-FSDP runs on CUDA devices only")
    assert done.stderr.count("\n") == 1


def test_what_it_cannot_do_is_refused_before_ranks_start() -> None:
    with cuda_standin():
        with pytest.raises(UnsupportedError, match="dp_replicate is 2"):
            verify("llama", ParallelConfig(engine="megatron_fsdp", dp_replicate=2))
        with pytest.raises(ConfigError, match="64 ranks need a GPU each"):
            verify("llama", ParallelConfig(engine="megatron_fsdp", dp_shard=64))


def test_ranks_on_the_cpu_refuse(ranks2: RankPool) -> None:
    with pytest.raises(UnsupportedError, match="CUDA devices only"):
        verify("llama", ParallelConfig(engine="megatron_fsdp", dp_shard=2), pool=ranks2)
