"""The models that are measured: configs of transformers, with random weights, written to folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 256,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"head_dim": 8},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}


def config_of(family: str, **sizes: Any) -> Any:
    """A config of ``family``: tiny, but for ``sizes``."""
    from transformers import AutoConfig

    return AutoConfig.for_model(family, **{**TINY, **FAMILIES.get(family, {}), **sizes})


def write_checkpoint(folder: Path, family: str, dtype: str = "float32", **sizes: Any) -> Path:
    """A checkpoint folder of random weights; seeded, so that every contender trains the same model."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(family, **sizes), dtype=getattr(torch, dtype))
    model.save_pretrained(folder)
    return folder


def batch_of(rows: int, length: int, vocabulary: int, seed: int) -> dict[str, Any]:
    """Random ids and labels, int64 ``[rows, length]``."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocabulary, (rows, length), generator=generator)
    return {"input_ids": ids, "labels": ids.clone()}
