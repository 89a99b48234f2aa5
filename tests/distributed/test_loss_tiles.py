"""``model(labels=...)`` with logits and loss in tiles: exact, and never with whole logits in memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from live_bytes import LiveBytes
from steps import assert_same, assert_same_gradients, assert_same_parameters
from tiny_models import EXPECTED_SHARE, assert_exact, batch, build, measure
from torch import Tensor, nn
from transformers import AutoModel, LlamaConfig

from shardwright import ParallelConfig, parallelize
from shardwright.distributed.runtime.tiled_logits import Call, Product, TiledLogits
from shardwright.errors import ConfigError, UnsupportedError
from shardwright.losses import call_with_loss
from shardwright.verify.ranks import RankPool, shared_mesh

TILES = {"loss_tiles": 4}
WAYS: dict[str, dict[str, Any]] = {
    "tp": {"tp": 2},
    "tp+sp": {"tp": 2, "sequence_parallel": True},
    "fsdp2": {"dp_shard": 2},
    "cp": {"cp": 2, "dp_shard": 1},
    "tp, compiled": {"tp": 2, "compile": "aot_eager", "activation_checkpointing": "full"},
}
WAYS_OF_FOUR: dict[str, dict[str, Any]] = {
    "tp x fsdp2": {"tp": 2, "dp_shard": 2},
    "tp+sp x fsdp2": {"tp": 2, "dp_shard": 2, "sequence_parallel": True, "activation_checkpointing": "full"},
    "cp x tp+sp": {"cp": 2, "tp": 2, "dp_shard": 1, "sequence_parallel": True},
}
# What models do to their logits on the way to the loss.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma2": {"tie_word_embeddings": True},  # caps them
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 3.0},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}


def _labelled(index: int, rows: int = 2) -> dict[str, Tensor]:
    data = batch(index, rows=rows)
    data["labels"] = data["labels"].masked_fill(data["labels"] % 4 == 1, -100)
    return data


def _compare(family: str, config: dict[str, Any]) -> None:
    parallel = ParallelConfig(**config, **TILES)
    mesh = shared_mesh(parallel)
    ranks, mine = mesh["dp"].size(), mesh["dp"].get_local_rank()
    reference = build(family, **FAMILIES[family])
    model = parallelize(copy.deepcopy(reference), parallel, mesh)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (model, reference)]
    for step in range(2):
        with torch.no_grad():  # an evaluation in between, of one row
            data = _labelled(77, rows=1)
            assert_same(model(**data).loss, reference(**data).loss, "evaluation")
        for micro in range(2):
            for rank in range(ranks):
                data = _labelled(100 * step + 10 * rank + micro)
                expected = reference(**data)
                (expected.loss / ranks).backward()
                if rank == mine:
                    output = model(**data)
                    assert_same(output.loss, expected.loss, "loss")
                    assert output.logits.shape == expected.logits.shape
                    output.loss.backward()
        assert_same_gradients(model, reference)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert_same_parameters(model, reference)


@pytest.mark.parametrize(
    ("family", "way"),
    [*(("llama", way) for way in WAYS if way != "cp"), *((family, "tp") for family in FAMILIES if family != "llama")],
)
def test_on_two_ranks(ranks2: RankPool, family: str, way: str) -> None:
    ranks2.run(_compare, family, WAYS[way])


@pytest.mark.parametrize(("family", "way"), list(zip(("llama", "gemma2", "cohere"), WAYS_OF_FOUR, strict=True)))
def test_on_four_ranks(ranks4: RankPool, family: str, way: str) -> None:
    ranks4.run(_compare, family, WAYS_OF_FOUR[way])


def _own_loss(config: dict[str, Any]) -> None:
    """A loss that is computed from logits inside of the model's call, with gradients and without."""
    parallel = ParallelConfig(**config, **TILES)
    mesh = shared_mesh(parallel)
    reference = build("gemma2")
    model = parallelize(copy.deepcopy(reference), parallel, mesh)
    data = _labelled(0)

    def loss(output: Any) -> Tensor:
        return F.cross_entropy(output.logits.flatten(0, 1).float(), data["labels"].flatten(), reduction="sum")

    ids = data["input_ids"]
    mine = call_with_loss(model, loss, input_ids=ids, use_cache=False)
    mine.backward()
    theirs = loss(reference(input_ids=ids, use_cache=False))
    theirs.backward()
    assert_same(mine, theirs, "loss")
    assert_same_gradients(model, reference)
    with torch.no_grad():
        assert_same(call_with_loss(model, loss, input_ids=ids), theirs, "without gradients")
    plain = call_with_loss(reference, loss, input_ids=ids)
    assert_same(plain, theirs, "of a model that computes no loss in tiles")


@pytest.mark.parametrize("way", ["tp", "tp+sp", "fsdp2", "cp"])
def test_a_loss_of_your_own(ranks2: RankPool, way: str) -> None:
    ranks2.run(_own_loss, WAYS[way])


# Memory


WIDE, LONG, TOKENS = 4001, 128, 256


def _peak(config: dict[str, Any]) -> tuple[int, int]:
    """Bytes of tensors that a training step makes, and elements of the largest logits among them."""
    parallel = ParallelConfig(**config)
    model = parallelize(build("llama", vocab_size=WIDE, max_position_embeddings=LONG), parallel, shared_mesh(parallel))
    data = batch(0, vocabulary=WIDE, length=LONG)
    model(**data).loss.backward()  # gradients, and FSDP2's buffers, are there from now on
    with LiveBytes(wide=-(-WIDE // parallel.tp)) as live:
        model(**data).loss.backward()
    return live.peak, live.widest


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tp", "tp+sp"])
def test_logits_are_never_whole(ranks2: RankPool, sequence_parallel: bool) -> None:
    config: dict[str, Any] = {"tp": 2, "sequence_parallel": sequence_parallel}
    width = -(-WIDE // 2)
    for (peak, widest), (tiled_peak, tiled_widest) in zip(
        ranks2.run(_peak, config), ranks2.run(_peak, {**config, "loss_tiles": 8}), strict=True
    ):
        assert widest >= TOKENS * (width - 1)
        assert tiled_widest <= TOKENS // 8 * width
        # Backward holds the log-probabilities and a gradient; of a tile, also the logits themselves.
        assert peak - tiled_peak > 1.5 * TOKENS * width * 4


def test_logits_are_never_whole_under_fsdp2(ranks2: RankPool) -> None:
    for (peak, widest), (tiled_peak, tiled_widest) in zip(
        ranks2.run(_peak, {"dp_shard": 2}), ranks2.run(_peak, {"dp_shard": 2, "loss_tiles": 8}), strict=True
    ):
        assert (widest, tiled_widest) == (TOKENS * WIDE, TOKENS // 8 * WIDE)
        assert peak - tiled_peak > 1.5 * TOKENS * WIDE * 4


# What stands in the place of logits


def _tiled(hidden: Tensor, weight: Tensor, call: Call) -> Any:
    product = Product(hidden, {"weight": weight}, lambda x, weights: F.linear(x, weights["weight"]))
    return TiledLogits.make(product, torch.empty(*hidden.shape[:-1], weight.shape[0], device="meta"), call)


IDS = torch.randint(40, (2, 12), generator=torch.Generator().manual_seed(3))
SCALES = torch.linspace(0.5, 2.0, 40)


def _in_place(x: Tensor) -> Tensor:
    x *= 0.5
    x.div_(3).tanh_()
    return F.cross_entropy(x.view(-1, 40), IDS.view(-1))


FOLLOWED: dict[str, Callable[[Any], Tensor]] = {
    "shifted": lambda x: F.cross_entropy(x[..., :-1, :].contiguous().view(-1, 40), IDS[..., 1:].reshape(-1)),
    "cast": lambda x: F.cross_entropy(x.float().to(torch.float64).reshape(-1, x.size(-1)), IDS.flatten()),
    "capped": lambda x: F.cross_entropy((torch.tanh(x / 5.0) * 5.0).flatten(0, 1), IDS.flatten(), reduction="sum"),
    "biased": lambda x: F.cross_entropy((2 * x + SCALES).view((-1, 40)), IDS.view(-1), reduction="none").square().sum(),
    "in place": _in_place,
    "some rows": lambda x: F.cross_entropy(x[:, -5:][IDS[:, -5:] > 7], IDS[:, -5:][IDS[:, -5:] > 7]),
    "weighted": lambda x: nn.CrossEntropyLoss(weight=SCALES, ignore_index=3)(x.view(-1, 40), IDS.view(-1)),
    "smoothed": lambda x: F.cross_entropy(
        x.view(-1, 40), IDS.view(-1), weight=SCALES, ignore_index=3, label_smoothing=0.2
    ),
    "on its device": lambda x: F.cross_entropy(x.to(IDS.device).unflatten(1, (3, 4)).reshape(24, -1), IDS.view(-1)),
}  # fmt: skip
WHOLE: dict[str, Callable[[Any], Tensor]] = {
    "classes second": lambda x: F.cross_entropy(x.transpose(1, 2), IDS),
    "probabilities": lambda x: F.cross_entropy(x.view(-1, 40), SCALES.softmax(0).expand(24, -1)),
    "by token": lambda x: F.cross_entropy((x * torch.linspace(0, 1, 12)[:, None]).view(-1, 40), IDS.view(-1)),
    "part of the vocabulary": lambda x: F.cross_entropy(x[..., :39].reshape(-1, 39), IDS.view(-1).clamp(max=38)),
    "own": lambda x: (x.logsumexp(-1) - x.gather(-1, IDS[..., None]).squeeze(-1)).mean() + x.mT.mean(),
}


@pytest.mark.parametrize("name", [*FOLLOWED, *WHOLE])
def test_code_that_uses_logits(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """The same result and gradients as of logits; a warning where they had to be computed as a whole."""
    use = {**FOLLOWED, **WHOLE}[name]
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2, 12, 8, generator=generator), torch.randn(40, 8, generator=generator)
    results = []
    for tiles in (None, 1, 5, 100):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logits = F.linear(*leaves) if tiles is None else _tiled(*leaves, Call(tiles))
        value = use(logits)
        value.backward()
        results.append((value.detach(), leaves[0].grad, leaves[1].grad))
    for found in results[1:]:
        torch.testing.assert_close(found, results[0], rtol=1e-5, atol=1e-5)
    assert bool(caplog.records) == (name in WHOLE)


class _OwnLoss(torch.autograd.Function):
    """A loss as fused kernels write them, with a gradient of its own."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return logits.logsumexp(-1).sum() * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones(2, 12, 40), grad


def test_a_gradient_that_would_be_lost_is_refused() -> None:
    weight, scale = torch.ones(40, 8, requires_grad=True), torch.ones((), requires_grad=True)
    logits = _tiled(torch.ones(2, 12, 8), weight, Call(2))
    loss = _OwnLoss.apply(logits, scale)
    with pytest.raises(UnsupportedError, match="autograd function of its own"):
        loss.backward()
    with pytest.raises(UnsupportedError, match="A kernel asks"):
        logits.data_ptr()


def test_a_cast_to_its_own_dtype_is_the_tensor_itself() -> None:
    logits = _tiled(torch.ones(2, 12, 8), torch.ones(40, 8), Call(2))
    same = logits.float().to(torch.float32).contiguous()
    assert same is logits
    same *= 2
    whole = 2 * 8 * torch.ones(2, 12, 40)
    torch.testing.assert_close(
        F.cross_entropy(logits.view(-1, 40), IDS.view(-1)), F.cross_entropy(whole.view(-1, 40), IDS.view(-1))
    )


def _mixed_precision() -> None:
    config = ParallelConfig(dp_shard=2, precision="bf16", **TILES)
    model, whole, data = parallelize(build("llama"), config, shared_mesh(config)), build("llama"), _labelled(0)
    output = model(**data)
    output.loss.backward()
    assert output.logits.dtype == torch.float32  # what the root returns
    torch.testing.assert_close(output.loss, whole(**data).loss, rtol=1e-2, atol=0)


def test_mixed_precision(ranks2: RankPool) -> None:
    ranks2.run(_mixed_precision)


def test_a_view_that_is_written_to_is_refused() -> None:
    logits = _tiled(torch.ones(2, 12, 8), torch.ones(40, 8), Call(2))
    assert logits[:, 1:].shape == (2, 11, 40)
    with pytest.raises(UnsupportedError, match="mul_"):
        logits.mul_(2)


def _logits_of_a_call() -> str:
    """They have a shape and no values; without labels they are as ever, sharded in training and plain without."""
    config = ParallelConfig(tp=2, **TILES)
    model, whole = parallelize(build("llama"), config, shared_mesh(config)), build("llama")
    data = _labelled(0)
    output = model(**data)
    assert (tuple(output.logits.shape), output.logits.dtype) == ((2, 15, 99), torch.float32)
    assert "(2, 15, 99)" in repr(output.logits)
    ids = data["input_ids"]
    assert_same(model(input_ids=ids).logits, whole(input_ids=ids).logits, "logits")
    with torch.no_grad():
        assert type(model(input_ids=ids).logits) is Tensor
    positional = model(ids, None, None, None, None, data["labels"])
    assert_same(positional.loss, whole(**data).loss, "labels by position")
    counted = model(**data, num_items_in_batch=7)
    assert_same(counted.loss, whole(**data, num_items_in_batch=7).loss, "a loss per item")
    with pytest.raises(UnsupportedError) as caught:
        output.logits.float().argmax(-1)
    return str(caught.value)


def test_logits_of_a_call_with_labels(ranks2: RankPool) -> None:
    for message in ranks2.run(_logits_of_a_call):
        assert message.startswith("loss_tiles=4 computes the logits")
        assert "argmax" in message


def test_verify(ranks2: RankPool) -> None:
    report = measure(ranks2, "llama", ParallelConfig(tp=2, **TILES))
    assert_exact(report, EXPECTED_SHARE)
    assert report.logits_rel_err > 0  # of the call without labels


def _no_head() -> str:
    config = ParallelConfig(tp=2, **TILES)
    model = AutoModel.from_config(LlamaConfig(vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                                              num_attention_heads=4, num_key_value_heads=2))  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        parallelize(model, config, shared_mesh(config))
    return str(caught.value)


def test_a_model_without_a_head_is_refused(ranks2: RankPool) -> None:
    for message in ranks2.run(_no_head):
        assert message.startswith("loss_tiles is 4, but LlamaModel does not say which module computes its logits")
