"""What stays gathered, what is gathered ahead, what runs twice: counted on real ranks, and exact."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from steps import assert_same_gradients
from tiny_models import batch, build
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode

from shardwright import ParallelConfig, parallelize
from shardwright.distributed.models.blocks import by_list, every_nth
from shardwright.distributed.parallelizer import unshard_fsdp2_model
from shardwright.distributed.planning.data import kept_gathered
from shardwright.distributed.planning.decide import decide
from shardwright.distributed.replay.reading import ModelReading
from shardwright.errors import ConfigError
from shardwright.verify.ranks import RankPool, shared_mesh

LAYERS = 4
FSDP = ParallelConfig(dp_shard=2)
TP_FSDP = ParallelConfig(tp=2, dp_shard=2, sequence_parallel=True)


def test_every_nth_block_of_each_list() -> None:
    blocks = [f"text.{n}" for n in range(5)] + [f"vision.{n}" for n in range(3)]
    lists = by_list([name for name in blocks if name != "text.1"] + ["text.1.mixer"], blocks)
    assert lists == {"text": ["text.0", "text.2", "text.3", "text.4", "text.1.mixer"], "vision": blocks[5:]}
    assert every_nth(by_list(blocks, blocks), 1) == blocks
    assert every_nth(by_list(blocks, blocks), 2) == ["text.1", "text.3", "vision.1"]
    assert every_nth(by_list(blocks, blocks), 4) == ["text.3"]


SIZES = {"a.0": 5, "a.1": 5, "b.0": 2, "b.1": 3, "b.2": 3}


@pytest.mark.parametrize(
    ("policy", "budget", "kept"),
    [
        ("always", 0, []),
        ("never", 0, ["a.0", "a.1", "b.0", "b.1", "b.2"]),
        ("default", 0, ["a.1", "b.2"]),
        ("default", 10, ["a.1", "b.2"]),
        ("default", 11, ["a.1", "b.1", "b.2"]),
        ("default", 13, ["a.1", "b.0", "b.1", "b.2"]),
        ("default", 99, ["a.0", "a.1", "b.0", "b.1", "b.2"]),
    ],
)
def test_as_many_of_the_last_blocks_stay_as_fit(policy: str, budget: int, kept: list[str]) -> None:
    assert sorted(kept_gathered(by_list(SIZES, list(SIZES)), SIZES, policy, budget)) == kept


def test_the_nearest_blocks_are_gathered_first() -> None:
    reading = ModelReading(build("qwen3", num_hidden_layers=LAYERS))
    data = decide(reading, ParallelConfig(prefetch=2), tp=1, fsdp2=True).data
    assert data is not None
    ahead = {name.rpartition(".")[2]: (after, before) for name, (after, before) in data.prefetch.items()}
    blocks = [f"model.layers.{n}" for n in range(LAYERS)]
    assert ahead["0"] == ((blocks[1], blocks[2]), ())
    assert ahead["2"] == ((blocks[3],), (blocks[1], blocks[0]))
    assert ahead["3"] == ((), (blocks[2], blocks[1]))


def _parallel(config: ParallelConfig, family: str = "qwen3") -> tuple[nn.Module, nn.Module]:
    reference = build(family, num_hidden_layers=LAYERS)
    return reference, parallelize(copy.deepcopy(reference), config, shared_mesh(config))


class Gathers(TorchDispatchMode):
    """Counts FSDP2's all-gathers, which are not functional collectives, in forward and in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.backward = False
        self.counts = Counter({False: 0, True: 0})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[self.backward] += func.namespace == "c10d" and "gather" in func.__name__
        return func(*args, **(kwargs or {}))


def _gathers(model: nn.Module, data: Any) -> tuple[int, int]:
    with Gathers() as seen:
        loss = model(**data).loss
        seen.backward = True
        loss.backward()
    return seen.counts[False], seen.counts[True]


def _two_steps(model: nn.Module, reference: nn.Module, what: str) -> tuple[int, int]:
    """Two exact steps; the gathers of the second."""
    everyone = [batch(10 * rank) for rank in range(dist.get_world_size() // (2 if "tp=2" in what else 1))]
    mesh_rank = dist.get_rank() // (2 if "tp=2" in what else 1)
    counts = (0, 0)
    for _ in range(2):
        model.zero_grad()
        reference.zero_grad()
        counts = _gathers(model, everyone[mesh_rank])
        for each in everyone:
            (reference(**each).loss / len(everyone)).backward()
        assert_same_gradients(model, reference, what)
    return counts


def _block_gib(model: nn.Module) -> float:
    return sum(param.numel() * param.element_size() for param in model.model.layers[0].parameters()) / 2**30


def _what_stays_gathered() -> None:
    size = _block_gib(build("qwen3", num_hidden_layers=1))
    settings: list[tuple[dict[str, Any], int]] = [
        ({}, 1),
        ({"reshard_after_forward": "always"}, 0),
        ({"reshard_after_forward": "never"}, LAYERS),
        ({"keep_gathered_gib": 2.5 * size}, 2),
        ({"keep_gathered_gib": 3.5 * size, "activation_checkpointing": "full"}, 3),
    ]
    for options, kept in settings:
        reference, model = _parallel(FSDP.with_(**options))
        assert _two_steps(model, reference, str(options)) == (LAYERS + 1, LAYERS - kept), options


def test_what_stays_gathered(ranks2: RankPool) -> None:
    """Blocks that stay are not gathered again in backward."""
    ranks2.run(_what_stays_gathered)


def _beside_tensor_parallelism() -> None:
    size = _block_gib(build("qwen3", num_hidden_layers=1)) / 2  # about: norms are whole
    for options, kept in (({"keep_gathered_gib": 2.5 * size}, 2), ({"prefetch": 3}, 1)):
        reference, model = _parallel(TP_FSDP.with_(**options))
        assert _two_steps(model, reference, f"tp=2 {options}") == (LAYERS + 1, LAYERS - kept), options


def test_beside_tensor_parallelism(ranks4: RankPool) -> None:
    ranks4.run(_beside_tensor_parallelism)


def _order(model: nn.Module, data: Any) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
    """Block -> the blocks still to come that are gathered, or on their way, when it runs: in forward, in backward."""
    blocks = list(model.model.layers)
    forward: dict[int, list[int]] = {}
    backward: dict[int, list[int]] = {}

    def note(seen: dict[int, list[int]], index: int, later: list[int]) -> Any:
        def hook(*_: Any) -> None:
            seen[index] = [n for n in later if _on_its_way(blocks[n])]

        return hook

    handles = []
    for n, block in enumerate(blocks):
        handles.append(block.input_layernorm.register_forward_pre_hook(note(forward, n, list(range(n + 1, LAYERS)))))
        handles.append(block.mlp.register_full_backward_pre_hook(note(backward, n, list(range(n)))))
    model(**data).loss.backward()
    for handle in handles:
        handle.remove()
    return forward, backward


def _on_its_way(block: nn.Module) -> bool:
    assert isinstance(block, FSDPModule)
    state = block._get_fsdp_state()
    groups = state._fsdp_param_groups if torch.__version__ >= "2.12" else [state._fsdp_param_group]
    return any(group.is_unsharded or group._all_gather_result is not None for group in groups)


def _prefetch() -> None:
    expected = {  # torch's own for 1: in forward the next gather is issued with the next block
        1: ({0: [], 1: [], 2: [], 3: []}, {0: [], 1: [0], 2: [1], 3: [2]}),
        2: ({0: [1, 2], 1: [2, 3], 2: [3], 3: []}, {0: [], 1: [0], 2: [0, 1], 3: [1, 2]}),
        9: ({0: [1, 2, 3], 1: [2, 3], 2: [3], 3: []}, {0: [], 1: [0], 2: [0, 1], 3: [0, 1, 2]}),
    }
    for depth, order in expected.items():
        reference, model = _parallel(FSDP.with_(prefetch=depth))
        kept = _two_steps(model, reference, f"prefetch {depth}")
        assert kept == (LAYERS + 1, LAYERS - 1), depth
        assert _order(model, batch(0)) == order
        with unshard_fsdp2_model(model), torch.no_grad():
            model(**batch(0))
        model.zero_grad()
        assert _order(model, batch(0)) == order  # the settings have survived
        assert _two_steps(model, reference, f"prefetch {depth}, after unsharding") == kept


def test_prefetch(ranks2: RankPool) -> None:
    ranks2.run(_prefetch)


def _runs(model: nn.Module, data: Any) -> Counter[int]:
    """How often each block's second norm runs in a step: its first thing that recomputation cannot leave out."""
    runs: Counter[int] = Counter()

    def note(index: int) -> Any:
        return lambda *_: runs.update([index])

    for index, block in enumerate(model.model.layers):
        block.post_attention_layernorm.register_forward_pre_hook(note(index))
    model(**data).loss.backward()
    return runs


def _every_second() -> None:
    for config in (FSDP, TP_FSDP.with_(dp_shard=1)):
        reference, model = _parallel(config.with_(activation_checkpointing="every_2"))
        assert _runs(model, batch(0)) == {0: 1, 1: 2, 2: 1, 3: 2}
        reference, model = _parallel(config.with_(activation_checkpointing="every_2"))
        for index in range(2):
            for each in (model, reference):
                each(**batch(index)).loss.backward()  # the same data on all ranks
        assert_same_gradients(model, reference, str(config))
    reference, _ = _parallel(FSDP)
    with pytest.raises(ConfigError, match="'every_5', but the model's longest list of blocks has 4"):
        parallelize(reference, FSDP.with_(activation_checkpointing="every_5"), shared_mesh(FSDP))


def test_every_second_block_is_recomputed(ranks2: RankPool) -> None:
    ranks2.run(_every_second)
