"""Losses that read the head's weight, or call parts of the model by themselves: as people write them to save memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from steps import assert_same_gradients, assert_same_parameters
from tiny_models import LENGTH, batch, build, from_meta
from torch import Tensor, nn
from torch.optim.optimizer import _foreach_supported_types

from shardwright import ParallelConfig, parallelize
from shardwright.distributed.runtime.checked import CheckedDTensor
from shardwright.distributed.runtime.read_weights import ReadableWeight
from shardwright.errors import UnsupportedError
from shardwright.losses import linear_cross_entropy, loss_in_tiles
from shardwright.verify.ranks import RankPool, shared_mesh

Batch = dict[str, Tensor]
Loss = Callable[[Any, Batch], Tensor]


def _hidden(model: Any, data: Batch) -> Tensor:
    return model.model(input_ids=data["input_ids"]).last_hidden_state


def _loss(logits: Tensor, data: Batch) -> Tensor:
    return F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), data["labels"][:, 1:].reshape(-1))


def _in_chunks(model: Any, data: Batch, head: Callable[[Tensor], Tensor]) -> Tensor:
    pieces = zip(_hidden(model, data).chunk(3, 1), data["labels"].chunk(3, 1), strict=True)
    losses = [F.cross_entropy(head(h).flatten(0, 1), y.flatten(), reduction="sum") for h, y in pieces]
    return torch.stack(losses).sum() / data["labels"].numel()


def _with_hidden_states(model: Any, data: Batch) -> Tensor:
    output = model(input_ids=data["input_ids"], output_hidden_states=True, logits_to_keep=1)
    return _loss(output.hidden_states[-1] @ model.lm_head.weight.T, data)


def _twice(model: Any, data: Batch) -> Tensor:
    """The model's own loss, and one from its parts."""
    own = model(**data).loss
    return own + _loss(F.linear(_hidden(model, data), model.lm_head.weight), data)


def _read_first(model: Any, data: Batch) -> Tensor:
    weight = model.lm_head.weight
    return _loss(_hidden(model, data) @ weight.transpose(0, 1), data)


def _policy(logits: Tensor, labels: Tensor, advantages: Tensor) -> Tensor:
    return -(logits.log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1) * advantages).sum()


ADVANTAGES = torch.linspace(-1, 1, 2 * LENGTH).view(2, LENGTH)
READERS: dict[str, Loss] = {
    "matmul": lambda m, x: _loss(_hidden(m, x) @ m.lm_head.weight.T, x),
    "torch.matmul": lambda m, x: _loss(torch.matmul(_hidden(m, x), m.lm_head.weight.t()), x),
    "linear": lambda m, x: _loss(F.linear(_hidden(m, x), m.lm_head.weight, m.lm_head.bias), x),
    "einsum": lambda m, x: _loss(torch.einsum("bsh,vh->bsv", _hidden(m, x), m.lm_head.weight), x),
    "rows": lambda m, x: F.linear(_hidden(m, x), m.lm_head.weight[:50]).square().mean() + m.lm_head.weight[3].sum(),
    "scaled": lambda m, x: _loss(_hidden(m, x) @ (m.lm_head.weight.float().T * 0.5), x),
    "called": lambda m, x: _loss(m.lm_head(_hidden(m, x)), x),
    "called in chunks": lambda m, x: _in_chunks(m, x, m.lm_head),
    "read in chunks": lambda m, x: _in_chunks(m, x, lambda h: h @ m.lm_head.weight.T),
    "hidden states": _with_hidden_states,
    "twice": _twice,
    "read first": _read_first,
    "the head alone": lambda m, x: _loss(_hidden(m, x).detach() @ m.lm_head.weight.T, x),
    "embeddings": lambda m, x: (_hidden(m, x) @ m.model.embed_tokens.weight.T).logsumexp(-1).mean(),
    "ours": lambda m, x: linear_cross_entropy(_hidden(m, x), m.lm_head.weight, x["labels"], shift=True, tiles=4),
    "ours, by token": lambda m, x: (
        linear_cross_entropy(_hidden(m, x), m.lm_head.weight, x["labels"], reduction="none", tiles=7) * ADVANTAGES
    ).sum(),
    "ours, in full": lambda m, x: linear_cross_entropy(
        _hidden(m, x), m.lm_head.weight, x["labels"].masked_fill(x["labels"] % 3 == 0, 7), m.lm_head.bias,
        ignore_index=7, label_smoothing=0.1, reduction="sum", on_logits=lambda y: 5 * torch.tanh(y / 5),
        tiles=100,
    ) / 30,
    "policy": lambda m, x: loss_in_tiles(_policy, _hidden(m, x), m.lm_head.weight, x["labels"], ADVANTAGES, tiles=3),
}  # fmt: skip
WAYS = {
    "tp": ParallelConfig(tp=2),
    "tp+sp": ParallelConfig(tp=2, sequence_parallel=True),
    "fsdp2": ParallelConfig(dp_shard=2),
    "cp": ParallelConfig(cp=2, dp_shard=1),
}
WAYS_OF_FOUR = {
    "tp x fsdp2": ParallelConfig(tp=2, dp_shard=2),
    "tp+sp x fsdp2": ParallelConfig(tp=2, dp_shard=2, sequence_parallel=True, activation_checkpointing="full"),
    "tp x replicas": ParallelConfig(tp=2, dp_replicate=2),
    "hsdp": ParallelConfig(dp_replicate=2, dp_shard=2),
}


def _model(bias: bool, tied: bool) -> nn.Module:
    """The head has a bias, or the embedding's weight."""
    model = build("llama", tie_word_embeddings=tied)
    if bias:
        model.lm_head.bias = nn.Parameter(torch.linspace(-1, 1, 99))
    return model


def _compare(config: ParallelConfig, tied: bool) -> dict[str, str]:
    """Two micro-batches, another for every data-parallel rank, clipped, and a step, in each way against one process."""
    mesh = shared_mesh(config)
    ranks, mine = mesh["dp"].size(), mesh["dp"].get_local_rank()
    found = {}
    for name, loss in READERS.items():
        reference = _model(not tied, tied)
        model = parallelize(copy.deepcopy(reference), config, mesh)
        optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (model, reference)]
        try:
            for micro in range(2):
                value = loss(model, batch(10 * mine + micro))
                value.backward()
                for rank in range(ranks):
                    expected = loss(reference, batch(10 * rank + micro))
                    (expected / ranks).backward()
                    if rank == mine:
                        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
            assert_same_gradients(model, reference)
            norms = [nn.utils.clip_grad_norm_(each.parameters(), 0.1) for each in (model, reference)]
            torch.testing.assert_close(norms[0].full_tensor(), norms[1], rtol=1e-5, atol=0)
            for optimizer in optimizers:
                optimizer.step()
            assert_same_parameters(model, reference)
        except (AssertionError, RuntimeError, NotImplementedError) as error:
            found[name] = f"{type(error).__name__}: {error}"[:300]
    return found


@pytest.mark.parametrize(
    ("way", "tied"), [("tp", False), ("tp", True), ("tp+sp", True), ("fsdp2", False), ("cp", False)]
)
def test_on_two_ranks(ranks2: RankPool, way: str, tied: bool) -> None:
    for found in ranks2.run(_compare, WAYS[way], tied):
        assert not found


@pytest.mark.parametrize(
    ("way", "tied"),
    [
        pytest.param(way, tied, marks=() if tied else pytest.mark.sweep)
        for way, tied in zip(WAYS_OF_FOUR, (False, True, False, True), strict=True)
    ],
)
def test_on_four_ranks(ranks4: RankPool, way: str, tied: bool) -> None:
    for found in ranks4.run(_compare, WAYS_OF_FOUR[way], tied):
        assert not found


def _optimizers() -> None:
    """Optimizers take the weight together with other parameters, and leave it what it is."""
    for foreach in (True, False):
        config = ParallelConfig(tp=2)
        reference = build("llama")
        model = parallelize(copy.deepcopy(reference), config, shared_mesh(config))
        optimizers = [torch.optim.AdamW(each.parameters(), lr=1e-3, foreach=foreach) for each in (model, reference)]
        for _ in range(2):
            for each, optimizer in zip((model, reference), optimizers, strict=True):
                optimizer.zero_grad()
                each(**batch(0)).loss.backward()
                optimizer.step()
        torch.testing.assert_close(model.lm_head.weight.full_tensor(), reference.lm_head.weight, rtol=1e-4, atol=1e-5)
        assert type(model.lm_head.weight) is ReadableWeight
        assert type(optimizers[0].state[model.lm_head.weight]["exp_avg"]) is CheckedDTensor


def test_optimizers(ranks2: RankPool) -> None:
    ranks2.run(_optimizers)
    assert ReadableWeight in _foreach_supported_types


def _copies() -> None:
    """What people do to models: copies, other dtypes, states of them, and models that start on meta."""
    config = ParallelConfig(tp=2)
    model, whole = parallelize(build("llama"), config, shared_mesh(config)), build("llama")
    data = batch(0)
    for each in (copy.deepcopy(model), from_meta(build("llama"), config, shared_mesh(config))):
        weight: Any = each.lm_head.weight
        assert type(weight) is ReadableWeight
        torch.testing.assert_close(READERS["linear"](each, data), READERS["linear"](whole, data))
    half = copy.deepcopy(model).bfloat16()
    assert READERS["linear"](half, data).dtype == torch.bfloat16
    with torch.no_grad():
        torch.testing.assert_close(READERS["linear"](model, data), READERS["linear"](whole, data))
        model.lm_head.weight.mul_(0.5)
        model.load_state_dict(parallelize(build("llama"), config, shared_mesh(config)).state_dict())
    torch.testing.assert_close(READERS["linear"](model, data), READERS["linear"](whole, data))


def test_copies(ranks2: RankPool) -> None:
    ranks2.run(_copies)


def _mixed_precision() -> None:
    """FSDP2 computes in bfloat16 and hands out float32; the loss computes in what it is told."""
    config = ParallelConfig(dp_shard=2, precision="bf16")
    reference, data = build("llama"), batch(0)
    model = parallelize(copy.deepcopy(reference), config, shared_mesh(config))
    expected = reference(**data).loss
    expected.backward()
    for dtype in (None, torch.bfloat16):
        model.zero_grad()
        hidden = _hidden(model, data)
        assert hidden.dtype == torch.float32
        loss = linear_cross_entropy(hidden, model.lm_head.weight, data["labels"], shift=True, dtype=dtype)
        loss.backward()
        torch.testing.assert_close(loss, expected, rtol=1e-2, atol=0)
        grad: Any = model.lm_head.weight.grad
        assert grad.dtype == torch.float32
        error = (grad.full_tensor() - reference.lm_head.weight.grad).norm() / reference.lm_head.weight.grad.norm()
        assert error < 3e-2


def test_mixed_precision(ranks2: RankPool) -> None:
    ranks2.run(_mixed_precision)


def test_half_precision_weights() -> None:
    """Gradients of all tiles are added up in float32: as good as one product in bfloat16, whatever their number."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(512, 32, generator=generator), torch.randn(99, 32, generator=generator)
    labels = torch.randint(99, (512,), generator=generator)
    errors = {}
    for tiles in (1, 64):
        exact = weight.double().requires_grad_()
        F.cross_entropy(F.linear(hidden.bfloat16().double(), exact.bfloat16().double()), labels).backward()
        low = weight.bfloat16().requires_grad_()
        linear_cross_entropy(hidden.bfloat16(), low, labels, tiles=tiles).backward()
        assert exact.grad is not None
        assert low.grad is not None
        errors[tiles] = float((low.grad.double() - exact.grad).norm() / exact.grad.norm())
    assert errors[64] < 1.5 * errors[1]


def _kernels() -> list[str]:
    """A kernel asks for an address: of the logits, of the weight outside, and of the weight inside of the forward."""
    config = ParallelConfig(tp=2)
    model = parallelize(build("llama"), config, shared_mesh(config))
    messages = []
    for tensor in (model(**batch(0)).logits, model.lm_head.weight, model.lm_head.weight.T):
        with pytest.raises(UnsupportedError) as caught:
            tensor.data_ptr()
        messages.append(str(caught.value))
    return messages


def test_kernels_are_refused(ranks2: RankPool) -> None:
    for messages in ranks2.run(_kernels):
        assert ["(2, 15, 99)" in messages[0], "(99, 32)" in messages[1], "(32, 99)" in messages[2]] == [True] * 3
        assert all("loss_tiles" in message and "linear_cross_entropy" in message for message in messages)
