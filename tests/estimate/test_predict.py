"""What the report is made of: rows that cover the model, plans that come back, reasons for refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from estimate_models import FAMILIES, config_of
from transformers import AutoModelForCausalLM, LlamaConfig

from shardwright import ParallelConfig
from shardwright.distributed.plan import ParallelPlan
from shardwright.distributed.planning.resolve import resolve, sharded_fraction
from shardwright.distributed.planning.sources import choose_plan
from shardwright.distributed.replay.reading import ModelReading
from shardwright.errors import ConfigError, PlanError
from shardwright.estimate import Prediction, predict
from shardwright.estimate.command import save_plan
from shardwright.estimate.predict import to_dict
from shardwright.estimate.rows import Row

TP_SP = ParallelConfig(tp=2, dp_shard=2, sequence_parallel=True)


def row(prediction: Prediction, pattern: str) -> Row:
    (found,) = [row for row in prediction.rows if row.pattern == pattern]
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_cover_the_model(family: str) -> None:
    prediction = predict(config_of(family), TP_SP)
    model = AutoModelForCausalLM.from_config(config_of(family))
    assert sum(row.parameters for row in prediction.rows) == sum(param.numel() for param in model.parameters())
    assert sum(row.memory.total for row in prediction.rows) == prediction.memory.total
    resolved = resolve(ModelReading(model), choose_plan(ModelReading(model)), 2, sequence_parallel=True)
    assert prediction.cut_share == pytest.approx(sharded_fraction(ModelReading(model), resolved))
    assert sum(row.count for row in prediction.rows) == len(resolved.modules) + len(resolved.parameters)


def test_every_row_says_why() -> None:
    prediction = predict(config_of("qwen3 tied"), TP_SP)
    assert prediction.plan.source == "huggingface"
    projection = row(prediction, "model.layers.*.self_attn.q_proj")
    assert (projection.style, projection.source, projection.rule, projection.count, projection.share) == (
        "colwise", "huggingface", "model.layers.*.self_attn.q_proj", 2, 1.0,
    )  # fmt: skip
    norm = row(prediction, "model.layers.*.input_layernorm")
    assert (norm.style, norm.source, norm.share) == ("sequence_parallel", "sequence parallelism", 0.0)
    assert row(prediction, "lm_head").parameters == 0  # counted with the embedding, whose weight it is
    plain = predict(config_of("qwen3 tied"), TP_SP.with_(sequence_parallel=False))
    assert row(plain, "model.norm").source == "no rule"


def test_a_tie_is_given_as_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(ParallelPlan({"model.embed_tokens": "embedding_rowwise"}).to_yaml())
    head = row(predict(config_of("qwen3 tied"), ParallelConfig(tp=2, plan=str(path))), "lm_head")
    assert (head.source, head.rule) == ("tie", "tied to model.embed_tokens")


def test_bare_parameters_have_rows_of_their_own() -> None:
    experts = row(predict(config_of("mixtral"), TP_SP), "model.layers.*.mlp.experts.gate_up_proj")
    assert (experts.style, experts.parameters, experts.share) == ("packed_colwise", 2 * 4 * 96 * 32, 1.0)


def test_repeated_key_value_heads_are_told() -> None:
    prediction = predict(config_of("llama one key-value head"), TP_SP)
    assert row(prediction, "model.layers.*.self_attn.k_proj").style == "kv_heads"
    assert prediction.attributes == {"model.layers.*.self_attn": {"num_key_value_groups": 2}}
    assert "1 key-value heads on 2 tensor-parallel ranks" in prediction.notes[0]


def test_json_is_complete() -> None:
    data = json.loads(json.dumps(to_dict(predict(config_of("mixtral"), TP_SP))))
    assert ParallelPlan.from_dict(data["plan"]) == predict(config_of("mixtral"), TP_SP).plan
    assert ParallelConfig.from_dict(data["parallel"]) == TP_SP
    assert data["parameters"]["total"] == sum(part["parameters"] for part in data["modules"])
    assert data["tp_collectives"]["per_training_step"]["all_gather"] == 10  # 4 in each layer, 2 outside
    blocks = ["model.layers.0", "model.layers.1"]
    assert data["decided"]["blocks"] == blocks
    assert [unit["modules"] for unit in data["decided"]["data"]["units"]][:2] == [[block] for block in blocks]
    assert data["decided"]["recomputed"] == []
    assert {"bytes_per_rank", "bytes_unsharded", "blocks", "rank_local_attributes", "notes"} <= set(data)


def test_saved_plan_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    first = predict(config_of("qwen3 tied"), TP_SP)
    save_plan(first.plan, path)
    again = predict(config_of("qwen3 tied"), TP_SP.with_(plan=str(path)))
    assert again.plan.source == "saved: huggingface"
    assert (again.memory, again.traffic) == (first.memory, first.traffic)
    assert [path] == list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="exists"):
        save_plan(first.plan, path)


def test_edited_plan_applies(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    save_plan(predict(config_of("llama"), TP_SP).plan, path)
    edited = path.read_text().replace("lm_head: colwise_logits", "lm_head: replicate")
    path.write_text(edited)
    head = row(predict(config_of("llama"), TP_SP.with_(plan=str(path))), "lm_head")
    assert (head.style, head.share) == ("replicate", 0.0)


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(PlanError, match="4 attention heads"):
        predict(config_of("llama"), ParallelConfig(tp=3))
    with pytest.raises(ConfigError, match="Did you mean"):
        predict("quen3", ParallelConfig(tp=2))
    with pytest.raises(ConfigError, match="weights is 'int8'"):
        predict(config_of("llama"), ParallelConfig(tp=2), weights="int8")


def test_a_model_of_405_billion_parameters_allocates_nothing() -> None:
    config = LlamaConfig(
        hidden_size=16384, intermediate_size=53248, num_hidden_layers=126, num_attention_heads=128,
        num_key_value_heads=8, vocab_size=128256,
    )  # fmt: skip
    prediction = predict(config, ParallelConfig(tp=8, dp_shard=64, sequence_parallel=True, precision="bf16"))
    assert prediction.parameters == 405_853_388_800
    assert prediction.memory.total == pytest.approx(16 * 405.85e9 / 512, rel=0.01)
    assert prediction.collectives()["all_gather"] == 4 * 126 + 2


def test_own_model_on_meta() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of("llama"))
    assert predict(model, TP_SP).memory == predict(config_of("llama"), TP_SP).memory
