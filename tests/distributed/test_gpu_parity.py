"""The steps of test_parity.py on GPUs: over NCCL on as many as there are, and by ranks that share one.

Run with ``make test-gpu``.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from test_parity import CHECKPOINTING, ON_FOUR, ON_TWO
from tiny_models import EXPECTED_SHARE, FAMILIES, assert_exact, measure

from shardwright import ParallelConfig
from shardwright.verify.ranks import RankPool

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


@pytest.mark.parametrize("mode", CHECKPOINTING)
@pytest.mark.parametrize("compiled", [False, True])
def test_nccl(gpus: RankPool, mode: str, compiled: bool) -> None:
    """FSDP2 with the GPU's own compiler; tensor parallel too where there is more than one GPU."""
    layouts = [ParallelConfig(dp_shard=gpus.world_size)]
    if gpus.world_size % 2 == 0:
        layouts.append(ParallelConfig(dp_shard=gpus.world_size // 2, tp=2, sequence_parallel=True))
    for config in layouts:
        changed = config.with_(activation_checkpointing=mode, compile=compiled)
        assert_exact(measure(gpus, "llama", changed), EXPECTED_SHARE if config.tp > 1 else 0.0)


@pytest.mark.parametrize("config", ON_TWO.values(), ids=ON_TWO)
@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks(shared2: RankPool, family: str, config: ParallelConfig) -> None:
    assert_exact(measure(shared2, family, config), EXPECTED_SHARE if config.tp > 1 else 0.0)


@pytest.mark.parametrize("config", ON_FOUR.values(), ids=ON_FOUR)
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_four_ranks(shared4: RankPool, family: str, config: ParallelConfig) -> None:
    assert_exact(measure(shared4, family, config), EXPECTED_SHARE if config.tp > 1 else 0.0)


@pytest.mark.parametrize("config", ON_TWO.values(), ids=ON_TWO)
def test_experts(shared2: RankPool, config: ParallelConfig) -> None:
    assert_exact(measure(shared2, "qwen3_moe", config, **MOE), 0.9 if config.tp > 1 else 0.0)


def test_compiled(shared2: RankPool) -> None:
    for config in (ParallelConfig(tp=2), ParallelConfig(tp=2, sequence_parallel=True)):
        assert_exact(measure(shared2, "qwen3", config.with_(compile=True)), EXPECTED_SHARE)


def test_long_sequences(gpus: RankPool) -> None:
    """Tiles, and inputs of blocks that wait on the host: there the copies run in a stream of their own."""
    config = ParallelConfig(
        dp_shard=gpus.world_size, activation_checkpointing="full", offload_activations=True, mlp_tiles=2, loss_tiles=3
    )
    for changed in (config, config.with_(compile=True)):
        assert_exact(measure(gpus, "llama", changed, num_hidden_layers=6))


def test_command() -> None:
    """On whatever GPUs there are."""
    command = [sys.executable, "-m", "shardwright.cli", "verify", "qwen3", "--tp", "2", "--device", "cuda"]
    subprocess.run(command, check=True, timeout=240)
