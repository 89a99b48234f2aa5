"""The page on fine-tuning, run as it stands."""

from __future__ import annotations

import json
import re
from contextlib import chdir
from pathlib import Path

import datasets
from blocks import ROOT
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from shardwright.train.config import JOB_CONFIG, load_config, read_config
from shardwright.train.prepare import prepare
from shardwright.train.rank import train
from shardwright.train.tokenizer import train_tokenizer
from shardwright.verify.ranks import RankPool, shared_mesh

PAGE = (ROOT / "docs" / "fine-tuning.md").read_text()
_FILE = re.compile(r'^```\w+ title="(.+?)"\n(.*?)^```$', re.MULTILINE | re.DOTALL)


def train_in_rank(folder: Path, job: Path) -> None:
    config = read_config(job / JOB_CONFIG)
    with chdir(folder):
        train(config, job, shared_mesh(config.sharding))


def test_the_files_of_the_page_train(ranks2: RankPool, tmp_path: Path) -> None:
    files = dict(_FILE.findall(PAGE))
    assert sorted(files) == ["chat.jinja", "chat.yaml", "talks.jsonl"]
    assert files["chat.yaml"].count("\n") == 10
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    talks = [json.loads(line) for line in files["talks.jsonl"].splitlines()]
    datasets.Dataset.from_list(talks * 10).save_to_disk(tmp_path / "saved_dataset")
    (tmp_path / "held_out.jsonl").write_text(files["talks.jsonl"])

    tokenizer = train_tokenizer([files["talks.jsonl"]], vocab_size=270)
    tokenizer.save_pretrained(tmp_path / "path" / "to" / "model")
    config = AutoConfig.for_model(
        "qwen3", hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, vocab_size=len(tokenizer), max_position_embeddings=512,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "path" / "to" / "model")

    job, said = tmp_path / "job", []
    job.mkdir()
    with chdir(tmp_path):
        prepare(load_config(Path("chat.yaml"), ["device=cpu", "check_first_step=true"]), job, said.append)
    assert any(">>5<|im_end|>\n" in re.sub(r"\[/?\w+\]", "", text) for text in said), said
    ranks2.run(train_in_rank, tmp_path, job)  # raises where the first step is not that of one process
    lines = [json.loads(line) for line in (tmp_path / "tuned" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["validation_loss"] < lines[0]["loss"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "tuned" / "model")
    asked = [{"role": "user", "content": "2"}]
    written = AutoTokenizer.from_pretrained(tmp_path / "tuned" / "model").apply_chat_template(
        asked, tokenize=False, add_generation_prompt=True
    )
    assert written == "<|im_start|>user\n2<|im_end|>\n<|im_start|>assistant\n"
