"""The trained model as a folder that plain transformers loads."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase


@torch.no_grad()
def export_model(model: nn.Module, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write ``folder`` so that ``AutoModelForCausalLM`` and ``AutoTokenizer`` load it, whole or not at all.

    Collective: every rank calls it. Parameters are gathered one after the other into rank 0's memory, which has to
    hold the whole model. A folder of that name is replaced.
    """
    state = gather_state(model)
    if dist.get_rank() == 0:
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
        skeleton.generation_config = model.generation_config
        skeleton.load_state_dict(state, assign=True)
        skeleton.tie_weights()
        with replaced(folder) as temporary:
            skeleton.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
    dist.barrier()


def gather_state(model: nn.Module) -> dict[str, Tensor]:
    """The whole state dict on the CPU of rank 0, and an empty one elsewhere; every rank calls it."""
    state = {}
    for name, value in model.state_dict().items():
        full = value.full_tensor() if isinstance(value, DTensor) else value
        if dist.get_rank() == 0:
            state[name] = full.detach().cpu()
    return state


@contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """A temporary folder beside ``folder`` that takes its name at the end, and vanishes if the body raises."""
    temporary = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
