"""Conversations, a chat template that marks the assistant's turns, and a tiny model's folder to fine-tune from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from shardwright.train.tokenizer import train_tokenizer

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>{% endgeneration %}"
    "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
UNMARKED = TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4} | {
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}


def tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerBase:
    made = train_tokenizer(["what is two and three? five"] * 3, vocab_size=270)
    made.add_special_tokens({"additional_special_tokens": ["</s>", "<user>", "<assistant>", "<system>"]})
    made.chat_template = template  # type: ignore[assignment]
    return made


def conversations(count: int = 24) -> list[dict[str, Any]]:
    """Of one to three questions, so that they differ in length."""
    return [
        {
            "messages": [
                message
                for turn in range(1 + number % 3)
                for message in (
                    {"role": "user", "content": f"{number} + {turn}"},
                    {"role": "assistant", "content": f"{number + turn}"},
                )
            ]
        }
        for number in range(count)
    ]


def write_lines(path: Path, records: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def model_folder(folder: Path, family: str = "llama", template: str | None = TEMPLATE) -> Path:
    tok = tokenizer(template)
    config = AutoConfig.for_model(family, **SIZES, vocab_size=len(tok), eos_token_id=tok.eos_token_id)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder
