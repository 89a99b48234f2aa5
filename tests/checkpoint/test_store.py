"""Training checkpoints: resumed at any mesh, kept and pruned, found damaged, exported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checkpoint_models import CONFIGS, MESHES, mesh_for, whole_state
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM, PreTrainedModel

from shardwright.checkpoint.export import export, inspect
from shardwright.checkpoint.load import init_pretrained
from shardwright.checkpoint.manifest import MANIFEST
from shardwright.checkpoint.run_info import list_checkpoints
from shardwright.checkpoint.state import RunState
from shardwright.checkpoint.store import CheckpointStore, latest_checkpoint, load_checkpoint
from shardwright.errors import CheckpointError
from shardwright.verify.ranks import RankPool


def _run(name: str, mesh: str, seed: int = 4) -> tuple[RunState, DeviceMesh]:
    config = MESHES[mesh]
    model = init_pretrained(CONFIGS[name], config, mesh_for(config), seed=seed, dtype=torch.float32)
    plain = [p for p in model.parameters() if p.ndim < 2]
    optimizer = AdamW(
        [{"params": [p for p in model.parameters() if p.ndim > 1]}, {"params": plain, "weight_decay": 0.0}], lr=1e-2
    )
    return RunState(model, optimizer, LambdaLR(optimizer, lambda step: 1 / (1 + step))), mesh_for(config)


def _steps(state: RunState, mesh: DeviceMesh, first: int, last: int) -> list[float]:
    """Each step has 4 rows, whatever the mesh."""
    losses = []
    dp = mesh["dp"]
    for step in range(first, last):
        ids = torch.randint(3, 97, (4, 8), generator=torch.Generator().manual_seed(step))
        loss = state.model(input_ids=(mine := ids.chunk(dp.size())[dp.get_local_rank()]), labels=mine).loss
        loss.backward()
        state.optimizer.step()
        state.optimizer.zero_grad()
        assert state.schedule is not None
        state.schedule.step()
        total = loss.detach().full_tensor() if isinstance(loss, DTensor) else loss.detach()
        dist.all_reduce(total, op=dist.ReduceOp.SUM, group=dp.get_group())
        losses.append(total.item() / dp.size())
    return losses


def _save_and_go_on(name: str, mesh: str, root: Path) -> tuple[list[float], dict[str, Tensor]]:
    state, device_mesh = _run(name, mesh)
    assert isinstance(state.model, PreTrainedModel)
    store = CheckpointStore(root, state.model)
    _steps(state, device_mesh, 0, 2)
    store.save(state, 2, {"row": 8}, notes={"mesh": mesh})
    losses = _steps(state, device_mesh, 2, 4)  # while it is written: what is saved is the state at the call
    store.close()
    return losses, whole_state(state.model)


def _resume(name: str, mesh: str, root: Path) -> tuple[list[float], dict[str, Tensor]]:
    state, device_mesh = _run(name, mesh, seed=5)
    folder = latest_checkpoint(root)
    assert folder is not None
    info = load_checkpoint(folder, state)
    assert (info.step, info.progress) == (2, {"row": 8})
    return _steps(state, device_mesh, 2, 4), whole_state(state.model)


@pytest.mark.parametrize("name", ["llama", "qwen3_tied", "phi3_packed", "mixtral_stacked"])
def test_resumes_at_another_mesh(ranks2: RankPool, ranks4: RankPool, tmp_path: Path, name: str) -> None:
    losses, weights = ranks4.run(_save_and_go_on, name, "tp2 x fsdp2", tmp_path)[0]
    meshes = [(ranks4, "tp2 x fsdp2"), (ranks2, "tp2"), (ranks2, "fsdp2"), (ranks4, "hsdp")]
    if name == "mixtral_stacked":
        meshes += [(ranks2, "ep2"), (ranks4, "efsdp2 x ep2")]
    for pool, mesh in meshes:
        same = mesh == "tp2 x fsdp2"
        for resumed, state in pool.run(_resume, name, mesh, tmp_path):
            assert resumed == (losses if same else pytest.approx(losses, rel=1e-5)), mesh
            for key, value in weights.items():
                # AdamW turns rounding of near-zero gradients into steps of the size of the learning rate
                torch.testing.assert_close(state[key], value, rtol=0, atol=0 if same else 1e-4, msg=key)


def test_resumes_at_another_ep(ranks2: RankPool, ranks4: RankPool, tmp_path: Path) -> None:
    losses, weights = ranks4.run(_save_and_go_on, "mixtral_stacked", "efsdp2 x ep2", tmp_path)[0]
    for pool, mesh in [(ranks2, "ep2"), (ranks2, "tp2")]:
        for resumed, state in pool.run(_resume, "mixtral_stacked", mesh, tmp_path):
            assert resumed == pytest.approx(losses, rel=1e-5), mesh
            for key, value in weights.items():
                torch.testing.assert_close(state[key], value, rtol=0, atol=1e-4, msg=key)


def _several(root: Path) -> None:
    state, mesh = _run("llama", "fsdp2")
    assert isinstance(state.model, PreTrainedModel)
    store = CheckpointStore(root, state.model, keep_last=2)
    for step, metric in [(1, 3.0), (2, 1.0), (3, None), (4, 2.0), (5, 1.5)]:
        _steps(state, mesh, step, step + 1)
        store.save(state, step, {}, metric=metric)
    store.close()


def test_keeps_the_last_and_the_best_and_exports(ranks2: RankPool, tmp_path: Path) -> None:
    ranks2.run(_several, tmp_path)
    assert [int(path.name[-1]) for path in list_checkpoints(tmp_path)] == [2, 4, 5]
    assert len(list(tmp_path.iterdir())) == 3

    contents = inspect(tmp_path)
    assert (contents.info.step, contents.model_type, contents.info.metric) == (5, "llama", 1.5)
    export(tmp_path, tmp_path / "out")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert contents.parameters == model.num_parameters()
    assert any("step" in line and "5" in line for line in contents.lines())
    for same in ranks2.run(_equals_export, tmp_path):
        assert same


def _equals_export(root: Path) -> bool:
    state, _ = _run("llama", "tp2", seed=9)
    load_checkpoint(root / "step-00000005", state)
    expected = AutoModelForCausalLM.from_pretrained(root / "out").state_dict()
    return all(value.equal(expected[name]) for name, value in whole_state(state.model).items() if name in expected)


def _refused(folder: Path, name: str) -> str:
    state, _ = _run(name, "fsdp2")
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder, state)
    return str(caught.value)


def test_damage_is_found_before_anything_is_loaded(ranks2: RankPool, tmp_path: Path) -> None:
    ranks2.run(_save_and_go_on, "llama", "fsdp2", tmp_path)
    good = tmp_path / "step-00000002"
    cut, flipped, lost, unlisted = (tmp_path / name for name in ("cut", "flipped", "lost", "unlisted"))
    for folder in (cut, flipped, lost, unlisted):
        shutil.copytree(good, folder)
    data = (cut / "state" / "__1_0.distcp").read_bytes()
    (cut / "state" / "__1_0.distcp").write_bytes(data[:-1])
    (flipped / "state" / "__1_0.distcp").write_bytes(data[:900] + bytes([data[900] ^ 4]) + data[901:])
    (lost / "state" / "__0_0.distcp").unlink()
    (unlisted / MANIFEST).unlink()
    for folder, words in [
        (cut, ["__1_0.distcp", "bytes"]),
        (flipped, ["__1_0.distcp", "checksum"]),
        (lost, ["__0_0.distcp", "lacks"]),
        (unlisted, [MANIFEST]),
    ]:
        for message in ranks2.run(_refused, folder, "llama"):
            assert all(word in message for word in words), message
    for message in ranks2.run(_refused, good, "qwen3_tied"):
        assert "another model" in message


def _one_rank_alone(root: Path) -> None:
    state, _ = _run("llama", "fsdp2")
    assert isinstance(state.model, PreTrainedModel)
    store = CheckpointStore(root, state.model, timeout=0.3)
    if dist.get_rank() == 1:
        with pytest.raises(CheckpointError, match="1 of 2 ranks"):
            store.save(state, 1, {})
    dist.barrier()
    store.save(state, 1, {}, wait=True)
    store.close()


def test_one_rank_alone_gets_an_error(ranks2: RankPool, tmp_path: Path) -> None:
    ranks2.run(_one_rank_alone, tmp_path)
    assert len(list_checkpoints(tmp_path)) == 1


def _unwritable(root: Path) -> None:
    state, mesh = _run("llama", "fsdp2")
    assert isinstance(state.model, PreTrainedModel)
    store = CheckpointStore(root, state.model)
    store.save(state, 1, {}, wait=True)
    store._tokenizer = _Tokenizer()  # type: ignore[assignment]
    store.save(state, 2, {})
    _steps(state, mesh, 2, 3)
    with pytest.raises(CheckpointError, match="No space left"):
        store.wait()
    store.close()


class _Tokenizer:
    """Something that is saved with the checkpoint and finds the disk full."""

    def save_pretrained(self, folder: Any) -> None:
        with open("/dev/full", "w") as full:
            full.write("x" * 10000)


def test_a_full_disk_leaves_the_checkpoint_before(ranks2: RankPool, tmp_path: Path) -> None:
    ranks2.run(_unwritable, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert json.loads((tmp_path / "step-00000001" / "run.json").read_text())["step"] == 1
