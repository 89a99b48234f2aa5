"""Host memory of loading and saving: what a rank has at most on top of its shards, seen by the kernel."""

from __future__ import annotations

import gc
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checkpoint_models import MESHES, mesh_for
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig

from shardwright import init_pretrained, load_pretrained, save_pretrained
from shardwright.checkpoint.slices import SLICE_BYTES
from shardwright.verify.ranks import RankPool

MB = 2**20
CONFIG = LlamaConfig(
    vocab_size=24576, hidden_size=1024, intermediate_size=4096, num_hidden_layers=5, num_attention_heads=8,
    num_key_value_heads=8, max_position_embeddings=64, tie_word_embeddings=True, dtype="float32",
)  # fmt: skip
LARGEST = 96 * MB  # the embedding, more than a slice
LOOSE = 32 * MB  # what Python, torch's threads and the allocator take for themselves


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 416 MB in one file, written without ever building the model."""
    folder = tmp_path_factory.mktemp("large")
    CONFIG.save_pretrained(folder)
    text = json.loads((folder / "config.json").read_text()) | {"architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(text))
    width, wide, vocabulary = CONFIG.hidden_size, CONFIG.intermediate_size, CONFIG.vocab_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, width)}
    shapes["model.norm.weight"] = (width,)
    for layer in range(CONFIG.num_hidden_layers):
        block = f"model.layers.{layer}"
        shapes |= {f"{block}.self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
        shapes |= {f"{block}.mlp.{name}_proj.weight": (wide, width) for name in ("gate", "up")}
        shapes |= {f"{block}.mlp.down_proj.weight": (width, wide)}
        shapes |= {f"{block}.{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
    tensors = {name: torch.full(shape, 1 + i / 64) for i, (name, shape) in enumerate(shapes.items())}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _peak(work: Callable[[], Any]) -> tuple[Any, int]:
    """What ``work()`` returns, and how far this process's memory rose above what it was, in bytes at the most.

    Counted is what the kernel holds for the process: its own pages and those of mapped files.
    """
    gc.collect()
    done, highest = threading.Event(), 0

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.002):
            highest = max(highest, _resident())

    before = _resident()
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        result = work()
    finally:
        done.set()
        thread.join()
    return result, max(highest, _resident()) - before


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def _bytes_here(model: nn.Module) -> int:
    local = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    return sum(part.numel() * part.element_size() for part in local)


def _load_and_save(folder: Path, mesh: str, to: Path) -> tuple[int, int, int]:
    """Bytes of this rank's shards, and by how much memory rose on top of them while loading and while saving."""
    config = MESHES[mesh]
    model, loading = _peak(lambda: load_pretrained(folder, config, mesh_for(config)))
    shards = _bytes_here(model)
    _, saving = _peak(lambda: save_pretrained(model, to, max_shard_size="40MB"))
    dist.barrier()
    return shards, loading - shards, saving


def _initialise() -> tuple[int, int]:
    """Bytes of this rank's shards of a random model, and by how much memory rose on top of them while it was made."""
    config = MESHES["tp2"]
    model, risen = _peak(lambda: init_pretrained(CONFIG, config, mesh_for(config)))
    shards = _bytes_here(model)
    return shards, risen - shards


def test_a_rank_of_a_random_model_holds_its_shards_and_one_weight() -> None:
    with RankPool(2) as fresh:
        results = fresh.run(_initialise)
    for shards, on_top in results:
        assert shards < 220 * MB
        assert on_top < LARGEST + LOOSE, f"{on_top / MB:.0f} MB"


@pytest.mark.parametrize("mesh", ["tp2", "fsdp2"])
def test_a_rank_holds_its_shards_and_one_slice(
    saved: Callable[[str], Path], folder: Path, tmp_path: Path, mesh: str
) -> None:
    with RankPool(2) as fresh:  # without anything that other tests have left in memory
        fresh.run(_load_and_save, saved("llama"), mesh, tmp_path / "first")  # what is paid once per process
        results = fresh.run(_load_and_save, folder, mesh, tmp_path / "out")
    total = (folder / "model.safetensors").stat().st_size
    assert sum(shards for shards, _, _ in results) < 1.01 * total
    for shards, loading, saving in results:
        assert loading < SLICE_BYTES + LOOSE, f"{loading / MB:.0f} MB on top of {shards / MB:.0f} MB"
        # One file, which is at the least one weight, and one more weight that is gathered meanwhile.
        assert saving < 2 * LARGEST + LOOSE, f"{saving / MB:.0f} MB, of a model of {total / MB:.0f} MB"
    written = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            written |= {name: opened.get_slice(name)[-1:].flatten()[-1].item() for name in opened.keys()}  # noqa: SIM118
    with safe_open(folder / "model.safetensors", framework="pt") as opened:
        assert written == {name: opened.get_slice(name)[-1:].flatten()[-1].item() for name in opened.keys()}  # noqa: SIM118
