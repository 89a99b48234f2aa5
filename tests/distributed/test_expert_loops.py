"""Loops around experts on ranks of their own: what holds for other sharded parameters holds for theirs."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from loops import LOOPS, loss
from steps import assert_same_gradients, assert_same_parameters
from test_optimizers import PARTS, WORKING
from test_written import RIGHT, RIGHT_OR_REFUSED
from tiny_models import batch, build
from torch import nn

from shardwright import ParallelConfig, gradient_norms, parallelize
from shardwright.distributed.runtime.expert_tensors import ExpertTensor
from shardwright.errors import UnsupportedError
from shardwright.verify.ranks import RankPool, shared_mesh
from shardwright.verify.step import full

EP = ParallelConfig(dp_shard=2, ep=2)
OVER_TP = ParallelConfig(dp_shard=1, tp=2, ep=2)
LAYOUTS = (EP, OVER_TP)
OPTIMIZERS = (  # that update one by one, in one call, and in one kernel; the rest are the same operations
    *("Adagrad", "RAdam", "Adam amsgrad", "Adam fused", "Rprop", "trust ratios"),
    *(name for name in WORKING if name.endswith("foreach") and not name.startswith("Adam")),
)
EXPERTS = "model.layers.0.mlp.experts"


def _plain() -> Any:
    return build("mixtral", num_local_experts=4, num_experts_per_tok=2)


def _parallel(config: ParallelConfig) -> Any:
    return parallelize(_plain(), config, shared_mesh(config))


def _same_numbers(loops: tuple[Callable[[nn.Module], list[float]], ...], config: ParallelConfig) -> None:
    for loop in loops:
        found, expected = loop(_parallel(config)), loop(_plain())
        assert found == pytest.approx(expected, abs=2e-6), f"{loop.__name__}, {config}"


@pytest.mark.parametrize(
    "config",
    [EP, OVER_TP, pytest.param(EP.with_(activation_checkpointing="full"), marks=pytest.mark.sweep)],
    ids=["ep", "over tp", "recomputed"],
)
def test_loops(ranks2: RankPool, config: ParallelConfig) -> None:
    ranks2.run(_same_numbers, LOOPS, config)


def _decayed(model: nn.Module, make: Callable[[Any], torch.optim.Optimizer]) -> list[float]:
    """Matrices decay and norms do not; a running average of all weights is kept in calls for all of them."""
    groups: list[dict[str, Any]] = [
        {"params": [param for param in model.parameters() if param.ndim > 1], "weight_decay": 0.2},
        {"params": [param for param in model.parameters() if param.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer, found = make(groups), []
    average = [param.detach().clone() for param in model.parameters()]
    for step in range(3):
        optimizer.zero_grad()
        (loss(model, step) + 1e-3 * sum(param.pow(2).sum() for param in model.parameters())).backward()
        found.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.step()
        torch._foreach_lerp_(average, [param.detach() for param in model.parameters()], 0.1)
    for param, mean in zip(model.parameters(), average, strict=True):
        param.data.copy_(mean)
    return found


def _steps() -> None:
    decaying: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
        "AdamW": lambda groups: torch.optim.AdamW(groups, lr=1e-2, eps=1e-2, foreach=True),
        "SGD": lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9, foreach=False),
    }
    for config in LAYOUTS:
        for name, make in decaying.items():
            model, reference = _parallel(config), _plain()
            assert _decayed(model, make) == pytest.approx(_decayed(reference, make), rel=1e-5)
            assert_same_parameters(model, reference, f"{name}, {config}")
    for turn, name in enumerate(OPTIMIZERS):
        model, reference = _parallel(LAYOUTS[turn % 2]), _plain()
        for each in (model, reference):
            optimizer = WORKING[name](list(each.parameters()))
            for step in range(2):
                optimizer.zero_grad()
                loss(each, step).backward()
                optimizer.step()
        assert_same_parameters(model, reference, f"{name}, {LAYOUTS[turn % 2]}")


def test_optimizers_decay_and_averages(ranks2: RankPool) -> None:
    ranks2.run(_steps)


FROZEN: dict[str, Callable[[str], bool]] = {
    "nothing": lambda name: False,
    "experts": lambda name: ".experts." in name,
    "routers": lambda name: ".gate." in name,
    "half of the experts' weights": lambda name: "down_proj" in name,
    "all but the head": lambda name: "lm_head" not in name,
    "all but experts": lambda name: ".experts." not in name,
}


def _favouring(frozen: Callable[[str], bool], expert: int) -> Any:
    """A plain model whose tokens go to ``expert`` and the one behind it."""
    model = _plain()
    for layer in model.model.layers:
        layer.mlp.gate.weight.data.mul_(0.01)
        layer.post_attention_layernorm.weight.data[0] = 3.0
        layer.mlp.gate.weight.data[expert, 0] = 2.0
        layer.mlp.gate.weight.data[expert + 1, 0] = 1.0
    model.model.embed_tokens.weight.data[:, 0] = 10.0
    for name, param in model.named_parameters():
        param.requires_grad_(not frozen(name))
    return model


def _frozen_and_ragged() -> None:
    """Ranks have sequences of other lengths, and the first one's experts get no token."""
    rank = torch.distributed.get_rank()
    batches = [{key: value[:, :length] for key, value in batch(length).items()} for length in (3, 7)]
    for turn, (name, frozen) in enumerate(FROZEN.items()):
        reference = _favouring(frozen, 2)
        for each in batches:
            (reference(**each).loss / 2).backward()
        config = EP.with_(activation_checkpointing=("none", "full")[turn % 2])
        model = parallelize(_favouring(frozen, 2), config, shared_mesh(config))
        model(**batches[rank]).loss.backward()
        assert_same_gradients(model, reference, f"frozen: {name}, {config.activation_checkpointing}")


def test_frozen_parts_and_other_lengths(ranks2: RankPool) -> None:
    ranks2.run(_frozen_and_ragged)


def _weights(model: Any) -> list[Any]:
    return [model.get_parameter(f"{EXPERTS}.{name}") for name in ("gate_up_proj", "down_proj")]


def _numbers() -> list[int]:
    reference, refused = _plain(), []
    loss(reference).backward()
    for config in LAYOUTS:
        model = _parallel(config)
        loss(model).backward()
        assert all(isinstance(each, ExpertTensor) for weight in _weights(model) for each in (weight, weight.grad))
        refused.append(0)
        for name, read in PARTS.items():
            for weight, whole in zip(_weights(model), _weights(reference), strict=True):
                for tensor, expected in ((weight, whole), (weight.grad, whole.grad)):
                    try:
                        found = read(tensor)
                    except UnsupportedError as error:
                        refused[-1] += "x.full_tensor().item()" in str(error)
                    else:
                        assert found == pytest.approx(read(expected), rel=1e-5, abs=1e-7), f"{name}, {config}"
        _norms(model, reference)
    return refused


def _norms(model: Any, reference: Any) -> None:
    for kind in (2.0, 1.0, math.inf):
        norms = {name: param.grad.norm(kind).item() for name, param in reference.named_parameters()}
        assert gradient_norms(model, kind) == pytest.approx(norms, rel=1e-5)
        grads: list[Any] = [param.grad for param in model.parameters()]
        total = nn.utils.get_total_norm([param.grad for param in reference.parameters()], kind).item()
        for found in (
            nn.utils.get_total_norm(grads, kind),
            nn.utils.get_total_norm(grads, kind, foreach=True),
            torch.stack([grad.norm(kind) for grad in grads]).norm(kind),
        ):
            assert full(found).item() == pytest.approx(total, rel=1e-5), kind


def test_numbers_are_whole_or_refused(ranks2: RankPool) -> None:
    refused = ranks2.run(_numbers)
    assert refused[0] == refused[1]
    assert min(refused[0]) >= 20


@torch.no_grad()
def _written() -> int:
    refused = 0
    for config in LAYOUTS:
        for here, there in zip(_weights(_parallel(config)), _weights(_plain()), strict=True):
            values = torch.arange(float(there.numel())).view(there.shape)
            for what, write in _writes().items():
                here.copy_(values)
                there.copy_(values)
                try:
                    write(here)
                except UnsupportedError as error:
                    if what in RIGHT or not re.search("weight.rows. = values|cannot compute", str(error)):
                        raise
                    refused += 1
                else:
                    write(there)
                assert torch.equal(full(here), there), f"{what}: {config}"
    return refused


def _writes() -> dict[str, Callable[[Any], Any]]:
    """Those that a tensor of experts takes, too: it has no transposed form, and few rows."""
    views = {"a row", "a row of data", "a row, detached", "selected", "a column", "flat", "in pieces"}
    writes = {name: write for name, write in RIGHT.items() if name != "through data"}
    return writes | {f"{name}, by a view": RIGHT_OR_REFUSED[name] for name in views}


def test_written_by_hand(ranks2: RankPool) -> None:
    refused = ranks2.run(_written)
    assert refused[0] == refused[1]
    assert refused[0] > 8
