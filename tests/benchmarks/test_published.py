"""Rows that others published: what is read of them, and which are not compared, with the reason."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from estimate_rows import bytes_of, estimated, order_kept
from published import Framework, Row, published_rows

from shardwright.estimate.trace.tracer import Tracer

LLAMA = {"hidden": 64, "intermediate": 128, "layers": 3, "heads": 4, "kv_heads": 2, "head_dim": 16, "vocab": 160,
         "tied": False, "qkv_bias": False, "qk_norm": False, "moe": None}  # fmt: skip
ROW: dict[str, Any] = {
    "id": "one", "source": {"repo": "KempnerInstitute/KempnerForge", "section": "Table"}, "model": LLAMA,
    "gpu": {"name": "NVIDIA H200", "memory": "141 GB", "hbm": None, "power_limit_w": None},
    "gpus": 2, "gpus_per_node": 2, "seq_len": 64, "micro_batch_per_dp_rank": 2, "grad_accum": 2,
    "layout": {"dp_shard": 1, "dp_replicate": 1, "tp": 2, "sp": True, "cp": 1, "pp": 1, "ep": 1},
    "engine": "TP only (DTensor), no FSDP", "reshard_after_forward": None,
    "precision": {"param": "bf16", "reduce": None, "weights_kept_in": "bf16", "optimizer_states": "bf16"},
    "optimizer": "AdamW fused", "activation_checkpointing": "full (per block)", "offload": None, "lora": None,
    "compile": None, "float8": None, "async_tp": False, "loss": {"kind": "F.cross_entropy", "chunked": False},
    "versions": "torch 2.11.0", "doubt": [],
    "measured": {"tokens_per_s_per_gpu": 100.0, "peak_memory_gib": 1.0, "memory_kind": "max allocated, GiB"},
    "judge": {"memory": "full", "speed": "full"},
}  # fmt: skip
FSDP2 = {"engine": "FSDP2", "layout": {**ROW["layout"], "tp": 1, "sp": False, "dp_shard": 2},
         "reshard_after_forward": True}  # fmt: skip


def rows_of(folder: Path, *changes: dict[str, Any]) -> list[Row]:
    path = folder / "rows.yaml"
    path.write_text(yaml.safe_dump([copy.deepcopy(ROW) | change for change in changes]))
    return list(published_rows(path))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"float8": "rowwise"}, "float8 rowwise"),
        ({"lora": "rank 16"}, "LoRA rank 16"),
        ({"layout": {**ROW["layout"], "pp": 2}}, "pipeline stages"),
        ({"layout": {**ROW["layout"], "cp": 2}}, "context parallelism"),
        ({"engine": "DeepSpeed ZeRO-3"}, "engine DeepSpeed ZeRO-3"),
        ({"seq_len": None, "gpus": None}, "the source does not say seq_len, gpus"),
        ({"judge": {"memory": "no", "speed": "fits-label"}}, "nothing usable was measured"),
        ({"activation_checkpointing": "by hand"}, "activation checkpointing 'by hand'"),
        ({"optimizer": "Lion"}, "optimizer Lion"),
        ({"gpu": {**ROW["gpu"], "name": "TPU v5"}}, "TPU v5: no such device"),
    ],
)
def test_what_has_no_counterpart_is_told(
    change: dict[str, Any], why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rows_of(tmp_path, change) == []
    assert f"not compared: one ({why}" in capsys.readouterr().out


def test_a_number_that_cannot_be_used_leaves_the_other(tmp_path: Path) -> None:
    speed_alone, memory_alone = rows_of(
        tmp_path, {"judge": {"memory": "no", "speed": "full"}},
        {"measured": {**ROW["measured"], "tokens_per_s_per_gpu": None}},
    )  # fmt: skip
    assert (speed_alone.tokens, speed_alone.bytes) == (100.0, None)
    assert (memory_alone.tokens, memory_alone.bytes) == (None, 2**30)


@pytest.mark.parametrize(
    ("said", "read"),
    [
        (None, "none"),
        ("full (per block, NO_REENTRANT)", "full"),
        ("selective, op: saves every second aten.mm plus attention", "selective_2"),
        ("selective, 2", "every_2"),
        ("selective, op", "selective"),
    ],
)
def test_checkpointing(said: str | None, read: str, tmp_path: Path) -> None:
    (row,) = rows_of(tmp_path, {"activation_checkpointing": said})
    assert row.config.activation_checkpointing == read


def test_what_other_programs_do_otherwise(tmp_path: Path) -> None:
    old, new, tensor = rows_of(
        tmp_path, {**FSDP2, "versions": "torch 2.6.0"},
        {**FSDP2, "compile": "torch.compile(model), whole model"}, {"compile": "torch.compile(model), whole model"},
    )  # fmt: skip
    assert old.framework == Framework(root_reshards=False, gathers_by_layer=True)
    assert new.framework == Framework(root_reshards=True, compiled="blocks", gathers_by_layer=True)
    assert tensor.framework == Framework(compiled="model", gathers_by_layer=True)
    assert new.machine.inside.pairwise == 4


def test_rows_are_estimated_as_their_programs_run(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, {}, {"source": {"repo": "other/other", "section": "Table"}}, FSDP2)
    found = [estimated(row, Tracer()) for row in rows]
    by_layer, shared = (made.speed.collectives["tp"] for made in found[:2])
    assert by_layer > shared > 0
    assert bytes_of(rows[2], found[2]) == found[2].peak.total
    assert order_kept(rows, found)[1] == 0, "rows that are equally fast, or of other sources, have no order"
