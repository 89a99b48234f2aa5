"""The page on fine-tuning, run as it stands."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import datasets
from blocks import ROOT
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from shardwright.train.tokenizer import train_tokenizer

PAGE = (ROOT / "docs" / "fine-tuning.md").read_text()
_FILE = re.compile(r'^```\w+ title="(.+?)"\n(.*?)^```$', re.MULTILINE | re.DOTALL)


def test_the_files_of_the_page_train(tmp_path: Path) -> None:
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

    command = [sys.executable, "-m", "shardwright.cli", "train", "chat.yaml", "device=cpu", "check_first_step=true"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "The first step equals one process." in done.stdout
    assert ">>5<|im_end|>\n<<" in done.stdout
    lines = [json.loads(line) for line in (tmp_path / "tuned" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["validation_loss"] < lines[0]["loss"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "tuned" / "model")
    asked = [{"role": "user", "content": "2"}]
    written = AutoTokenizer.from_pretrained(tmp_path / "tuned" / "model").apply_chat_template(
        asked, tokenize=False, add_generation_prompt=True
    )
    assert written == "<|im_start|>user\n2<|im_end|>\n<|im_start|>assistant\n"
