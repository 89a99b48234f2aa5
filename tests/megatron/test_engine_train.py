"""``shardwright train`` with engine megatron_fsdp against the same run with fsdp2, which equals one process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from running import BASE, apart, make_job, metrics, run_job, weights
from standin import cuda_standin

from shardwright.checkpoint.export import export
from shardwright.errors import RunError, UnsupportedError
from shardwright.train.config import load_config
from shardwright.train.launch import check_engine
from shardwright.verify.ranks import RankPool

ENGINE = "sharding.engine=megatron_fsdp"
ENGINES = {"megatron": [ENGINE], "fsdp2": []}
CPU = "device=cpu"


def same_runs(a: Path, b: Path, steps: list[int]) -> None:
    """``steps`` of run ``a`` have the numbers of ``b``, and both end with the same weights."""
    found, expected = metrics(a), [line for line in metrics(b) if line["step"] in steps]
    assert [line["step"] for line in found] == steps
    for line, wanted in zip(found, expected, strict=True):
        assert line == pytest.approx(wanted, rel=1e-5)
    assert apart(weights(a / "run/model"), weights(b / "run/model")) < 1e-5


def start(ranks: RankPool, folder: Path, *overrides: str) -> Path:
    ranks.run(run_job, make_job(folder, [CPU, *overrides]))
    return folder


def test_train_and_resume(ranks2: RankPool, tmp_path: Path) -> None:
    """The same numbers and weights with either engine, and either goes on from what the other has saved."""
    dp = ["sharding.dp_shard=2", "checkpoint.every=2"]
    ours = start(ranks2, tmp_path / "megatron", ENGINE, *dp, "check_first_step=true")
    theirs = start(ranks2, tmp_path / "fsdp2", *dp)
    same_runs(ours, theirs, [1, 2, 3, 4])
    assert metrics(ours)[-1]["loss"] < metrics(ours)[0]["loss"]
    export(ours / "run", tmp_path / "exported")
    assert apart(weights(tmp_path / "exported"), weights(ours / "run/model")) == 0.0
    halfway = f"checkpoint.resume={ours}/run/checkpoints/step-00000002"
    same_runs(start(ranks2, tmp_path / "on", ENGINE, *dp, halfway), ours, [3, 4])
    same_runs(start(ranks2, tmp_path / "tp", ENGINE, "sharding.tp=2", halfway), ours, [3, 4])
    same_runs(start(ranks2, tmp_path / "to", "sharding.dp_shard=2", halfway), ours, [3, 4])
    other = f"checkpoint.resume={theirs}/run/checkpoints/step-00000002"
    same_runs(start(ranks2, tmp_path / "from", ENGINE, "sharding.dp_shard=2", other), ours, [3, 4])


PACKED = [
    "model.config={model_type: phi3, hidden_size: 32, intermediate_size: 40, num_hidden_layers: 2, "
    "num_attention_heads: 4, num_key_value_heads: 2, max_position_embeddings: 64, pad_token_id: 0, "
    "tie_word_embeddings: true}",
    "sharding.tp=2",
    "sharding.dp_shard=2",
    "sharding.sequence_parallel=true",
]


def test_tensor_parallel_packed_weights_from_a_checkpoint(ranks4: RankPool, tmp_path: Path) -> None:
    """gate|up is cut inside each half, so a shard is several boxes; another run starts from the first one's model."""
    first = start(ranks4, tmp_path / "first", ENGINE, *PACKED, "checkpoint.every=2", "check_first_step=true")
    same_runs(first, start(ranks4, tmp_path / "fsdp2", *PACKED), [1, 2, 3, 4])
    halfway = f"checkpoint.resume={first}/run/checkpoints/step-00000002"
    same_runs(start(ranks4, tmp_path / "on", ENGINE, *PACKED, halfway), first, [3, 4])
    path = [f"model.path={first}/run/model", "model.config=null", "tokenizer.vocab_size=null", *PACKED[1:]]
    again = start(ranks4, tmp_path / "again", ENGINE, *path, "check_first_step=true")
    same_runs(again, start(ranks4, tmp_path / "again_fsdp2", *path), [1, 2, 3, 4])


def test_a_gradient_that_is_no_number(ranks2: RankPool, tmp_path: Path) -> None:
    """It ends the run and names the parameter, or that one update is left out, whichever engine."""
    blows_up = ["sharding.dp_shard=2", "optimizer.lr=1e30", "schedule.warmup_steps=0", "model.dtype=float32"]
    with pytest.raises(RunError, match=r"first in the gradient of model\.embed_tokens\.weight"):
        start(ranks2, tmp_path / "raise", ENGINE, *blows_up)
    skipped = [
        start(ranks2, tmp_path / name, *engine, *blows_up, "not_finite=skip") for name, engine in ENGINES.items()
    ]
    ours, theirs = map(metrics, skipped)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs])


def test_bfloat16(ranks2: RankPool, tmp_path: Path) -> None:
    """Both compute in bfloat16 and keep float32 weights; they round at the same places."""
    low = ["sharding.dp_shard=2", "sharding.precision=bf16"]
    both = [start(ranks2, tmp_path / name, *engine, *low) for name, engine in ENGINES.items()]
    ours, theirs = map(metrics, both)
    for mine, wanted in zip(ours, theirs, strict=True):
        assert mine["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-5)
    assert {value.dtype for value in weights(both[0] / "run/model").values()} == {torch.float32}


def test_where_there_is_no_gpu_it_says_so_before_any_rank_starts(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps(BASE))
    command = [sys.executable, "-m", "shardwright.cli", "train", "run.json", CPU, ENGINE]
    failed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=250, check=False)
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr.startswith("Error: Megatron-FSDP runs on CUDA devices only")
    assert failed.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_replicas_are_refused_before_any_rank_starts(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps(BASE))
    config = load_config(tmp_path / "run.json", [CPU, ENGINE, "sharding.dp_replicate=2"])
    with cuda_standin(), pytest.raises(UnsupportedError, match="dp_replicate is 2"):
        check_engine(config)
