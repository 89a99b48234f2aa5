"""Loading into shards that lie on a GPU. Run with ``make test-gpu``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_models import CONFIGS, MESHES, mesh_for, whole_state
from torch import Tensor
from transformers import AutoModelForCausalLM

from shardwright import load_pretrained
from shardwright.verify.ranks import RankPool

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def _load(folder: Path, mesh: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The whole state on the CPU, after one forward on the GPU."""
    config = MESHES[mesh]
    model = load_pretrained(folder, config, mesh_for(config), dtype=dtype)
    assert {param.device.type for param in model.parameters()} == {"cuda"}
    state = whole_state(model)
    with torch.no_grad():
        state["logits"] = model(input_ids=torch.arange(3, 11, device="cuda")[None]).logits.float()
    return {name: value.cpu() for name, value in state.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mesh", ["tp2", "fsdp2"])
@pytest.mark.parametrize("name", CONFIGS)
def test_load(shared2: RankPool, saved: Callable[[str], Path], name: str, mesh: str, dtype: torch.dtype) -> None:
    plain = AutoModelForCausalLM.from_pretrained(saved(name), dtype=dtype).cuda()
    expected = whole_state(plain)
    with torch.no_grad():
        logits = plain(input_ids=torch.arange(3, 11, device="cuda")[None]).logits.float().cpu()
    for found in shared2.run(_load, saved(name), mesh, dtype):
        seen = found.pop("logits")
        assert list(found) == list(expected)
        for key, value in expected.items():
            assert found[key].equal(value.cpu()), key
        assert (seen - logits).norm() < (1e-5 if dtype is torch.float32 else 0.2) * logits.norm()
