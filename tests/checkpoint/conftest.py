"""Small checkpoints on disk, written by plain transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_models import CONFIGS
from transformers import AutoModelForCausalLM


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``saved("llama")``: a folder with that model, in files of at most 20 KB."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            torch.manual_seed(1)
            model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float32)
            for parameter in model.parameters():
                parameter.data.normal_()
            model.save_pretrained(made[name], max_shard_size="20KB")
        return made[name]

    return get
