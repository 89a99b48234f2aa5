"""Losses that users compute from sharded logits, and what of the vocabulary is in memory meanwhile."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from steps import assert_same, assert_same_step
from tiny_models import batch, build
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor, Shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shardwright import ParallelConfig, parallelize
from shardwright.verify.ranks import RankPool, shared_mesh

TARGETS = batch(3)["input_ids"].roll(-1, 1)
SOME_IGNORED = TARGETS.masked_fill(torch.arange(TARGETS.numel()).view_as(TARGETS) % 3 == 0, -100)
WEIGHTS = torch.linspace(0.5, 2.0, 99)
ADVANTAGES = torch.linspace(-1.0, 1.0, TARGETS.numel()).view_as(TARGETS)


def _token_log_probabilities(logits: Tensor) -> Tensor:
    return torch.gather(logits.log_softmax(-1), -1, TARGETS.unsqueeze(-1)).squeeze(-1)


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda x: F.cross_entropy(x.flatten(0, 1), TARGETS.flatten()),
    "view, float": lambda x: F.cross_entropy(x.float().view(-1, x.shape[-1]), TARGETS.reshape(-1)),
    "shifted": lambda x: F.cross_entropy(x[..., :-1, :].reshape(-1, 99), TARGETS[..., 1:].reshape(-1)),
    "shifted, contiguous": lambda x: F.cross_entropy(x[:, :-1].contiguous().view(-1, 99), TARGETS[:, 1:].flatten()),
    "ignored": lambda x: F.cross_entropy(x.flatten(0, 1), SOME_IGNORED.flatten()),
    "other ignore_index": lambda x: F.cross_entropy(x.flatten(0, 1), TARGETS.flatten(), ignore_index=98),
    "sum": lambda x: F.cross_entropy(x.flatten(0, 1), SOME_IGNORED.flatten(), reduction="sum") / 7,
    "none": lambda x: F.cross_entropy(x.flatten(0, 1), SOME_IGNORED.flatten(), reduction="none") * ADVANTAGES.flatten(),
    "smoothed": lambda x: F.cross_entropy(x.flatten(0, 1), SOME_IGNORED.flatten(), label_smoothing=0.1),
    "smoothed, none": lambda x: F.cross_entropy(x[0], TARGETS[0], reduction="none", label_smoothing=0.3),
    "weighted": lambda x: F.cross_entropy(x.flatten(0, 1), SOME_IGNORED.flatten(), weight=WEIGHTS),
    "weighted, smoothed": lambda x: F.cross_entropy(
        x.flatten(0, 1), SOME_IGNORED.flatten(), weight=WEIGHTS, label_smoothing=0.1
    ),
    "module": lambda x: nn.CrossEntropyLoss()(x.flatten(0, 1), SOME_IGNORED.flatten()),
    "classes second": lambda x: F.cross_entropy(x.transpose(1, 2), SOME_IGNORED),
    "policy gradient": lambda x: -(_token_log_probabilities(x) * ADVANTAGES).mean(),
    "policy gradient, shifted": lambda x: (
        -(F.log_softmax(x[:, :-1], dim=-1).gather(-1, TARGETS[:, 1:, None]).squeeze(-1) * ADVANTAGES[:, 1:]).sum()
    ),
    "preference": lambda x: -F.logsigmoid(_token_log_probabilities(x).sum(-1) @ torch.tensor([1.0, -1.0])),
    "temperature": lambda x: F.cross_entropy((x / 0.7).flatten(0, 1), TARGETS.flatten()),
    "selected minus logsumexp": lambda x: (
        (x.gather(-1, TARGETS[..., None]).squeeze(-1) - x.logsumexp(-1)).mean()
    ),
    "entropy": lambda x: -(x.softmax(-1) * x.log_softmax(-1)).sum(-1).mean(),
    "nll": lambda x: F.nll_loss(F.log_softmax(x.flatten(0, 1), -1), SOME_IGNORED.flatten()),
    "z-loss": lambda x: F.cross_entropy(x.flatten(0, 1), TARGETS.flatten()) + 1e-2 * x.logsumexp(-1).square().mean(),
    "distillation": lambda x: F.kl_div(
        x.flatten(0, 1).log_softmax(-1), WEIGHTS.softmax(-1).expand(30, -1), reduction="batchmean"
    ),
    "distillation of sharded": lambda x: _distillation(x),
    "distillation, log": lambda x: F.kl_div(
        x.log_softmax(-1), (x * 0.5).detach().log_softmax(-1), reduction="sum", log_target=True
    ),
    "distillation, none": lambda x: (
        F.kl_div(x.log_softmax(-1), WEIGHTS.softmax(-1).expand(2, 15, -1), reduction="none").sum(-1) * ADVANTAGES
    ).mean(),
    "nll, weighted": lambda x: F.nll_loss(x.flatten(0, 1).log_softmax(-1), SOME_IGNORED.flatten(), weight=WEIGHTS),
    "nll, none": lambda x: (
        F.nll_loss(x.flatten(0, 1).log_softmax(-1), SOME_IGNORED.flatten(), reduction="none") * ADVANTAGES.flatten()
    ),
    "softmax": lambda x: (
        F.softmax(x, -1).gather(-1, TARGETS[..., None]).log().mean() + torch.softmax(x, 2).square().sum()
    ),
    "logsumexp": lambda x: (x.logsumexp(-1, keepdim=True)[..., 0] * ADVANTAGES + torch.logsumexp(x, 2)).mean(),
    "softmax of positions": lambda x: x.softmax(1)[:, 0].square().mean() + x.logsumexp(1).mean(),
    "penalty": lambda x: x.square().mean(),
}  # fmt: skip


def _parallel(model: nn.Module, **degrees: Any) -> nn.Module:
    config = ParallelConfig(**degrees)
    return parallelize(model, config, shared_mesh(config))


def _check_losses(family: str, changes: dict[str, Any], sequence_parallel: bool) -> dict[str, str]:
    reference = build(family, **changes)
    model = _parallel(copy.deepcopy(reference), tp=2, sequence_parallel=sequence_parallel)
    ids = batch(3)["input_ids"]
    failures = {}
    for name, loss in LOSSES.items():
        try:
            assert_same_step(model, reference, lambda m, loss=loss: loss(m(input_ids=ids).logits), name)
        except (AssertionError, RuntimeError, NotImplementedError, TypeError) as error:
            failures[name] = f"{type(error).__name__}: {error}"[:300]
    return failures


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tp", "tp+sp"])
@pytest.mark.parametrize(
    ("family", "changes"), [("llama", {}), ("gemma2", {"tie_word_embeddings": True})], ids=["llama", "gemma2-tied"]
)
def test_losses_from_logits(ranks2: RankPool, family: str, changes: dict[str, Any], sequence_parallel: bool) -> None:
    for failures in ranks2.run(_check_losses, family, changes, sequence_parallel):
        assert not failures


def _logits_are_a_dtensor() -> None:
    model, reference = _parallel(build("llama"), tp=2), build("llama")
    ids, labels = batch(1)["input_ids"], batch(1)["labels"]
    logits = model(input_ids=ids).logits
    assert isinstance(logits, DTensor)
    assert logits.placements == (Shard(2),)
    assert logits.shape == (2, 15, 99)
    expected = reference(input_ids=ids).logits
    assert_same(logits, expected, "logits")
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))  # a metric: plain, and equal on every rank
    output = model(input_ids=ids, labels=labels)
    assert type(output.loss) is torch.Tensor
    assert_same(output.loss, reference(input_ids=ids, labels=labels).loss, "loss")
    with pytest.raises(IndexError, match="99"):
        F.cross_entropy(logits.flatten(0, 1), torch.full((30,), 99))
    nothing = F.cross_entropy(logits.flatten(0, 1), torch.full((30,), -100))
    assert nothing.isnan()  # torch's answer where there is no target at all


def test_logits_of_a_training_step(ranks2: RankPool) -> None:
    ranks2.run(_logits_are_a_dtensor)


def _plain_without_gradients() -> None:
    for sequence_parallel in (False, True):
        reference = build("gemma2").eval()
        model = _parallel(build("gemma2"), tp=2, sequence_parallel=sequence_parallel).eval()
        ids, mask = batch(1)["input_ids"], torch.ones(2, 15, dtype=torch.long)
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                for extra in ({}, {"attention_mask": mask}, {"output_hidden_states": True}, {"logits_to_keep": 1}):
                    output, expected = model(input_ids=ids, **extra), reference(input_ids=ids, **extra)
                    assert type(output.logits) is Tensor
                    assert_same(output.logits, expected.logits, f"logits with {extra}")
                    for mine, theirs in zip(output.hidden_states or (), expected.hidden_states or (), strict=True):
                        assert type(mine) is Tensor
                        assert_same(mine, theirs, "hidden states")
                labelled = model(input_ids=ids, labels=ids)
                assert_same(labelled.loss, reference(input_ids=ids, labels=ids).loss, "loss without gradients")
                as_tuple = model(input_ids=ids, return_dict=False)
                assert type(as_tuple[0]) is Tensor


def test_evaluation_gives_plain_whole_logits(ranks2: RankPool) -> None:
    ranks2.run(_plain_without_gradients)


class LargestDim(TorchDispatchMode):
    """The longest dim of any plain tensor that an operation returns; of a DTensor, what its local operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.longest = 0
        self.where = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor turns it into local operations, which come by here again
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            # DTensor works out shapes on tensors without storage.
            real = isinstance(leaf, Tensor) and not isinstance(leaf, (DTensor, FakeTensor)) and not leaf.is_meta
            # An expanded tensor takes no more memory than what it was expanded from.
            real = real and leaf.untyped_storage().nbytes() >= leaf.numel() * leaf.element_size()
            if real and leaf.ndim and max(leaf.shape) > self.longest:
                self.longest, self.where = max(leaf.shape), str(func)
        return result


WIDE = 1001  # longer than anything else in the model and the batch


def _longest(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> tuple[int, str]:
    with LargestDim() as seen:
        loss(model).backward()
    return seen.longest, seen.where


def _entropy(logits: Tensor) -> Tensor:
    return -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()


def _distillation(logits: Tensor) -> Tensor:
    teacher = (2 * logits).detach().softmax(-1)
    return F.kl_div(logits.log_softmax(-1), teacher, reduction="batchmean")


def _vocabulary_in_memory() -> None:
    ids = batch(0, vocabulary=WIDE)["input_ids"]

    def shifted(logits: Tensor) -> Tensor:
        rows = logits[..., :-1, :].reshape(-1, WIDE)
        return F.cross_entropy(rows, ids[..., 1:].reshape(-1), label_smoothing=0.1)

    losses: dict[str, Callable[[nn.Module], Tensor]] = {
        "labels": lambda m: m(input_ids=ids, labels=ids).loss,
        "own": lambda m: shifted(m(input_ids=ids).logits),
        "policy": lambda m: m(input_ids=ids).logits.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).mean(),
        "z-loss": lambda m: m(input_ids=ids).logits.logsumexp(-1).square().mean(),
        "entropy": lambda m: _entropy(m(input_ids=ids).logits),
        "nll": lambda m: F.nll_loss(m(input_ids=ids).logits.flatten(0, 1).log_softmax(-1), ids.flatten()),
        "distillation": lambda m: _distillation(m(input_ids=ids).logits),
    }
    whole = build("llama", vocab_size=WIDE)
    for name, loss in losses.items():
        assert _longest(whole, loss)[0] == WIDE, name  # the instrument works
    for family, tied in (("llama", False), ("gemma2", True)):
        for sequence_parallel in (False, True):
            model = build(family, vocab_size=WIDE, tie_word_embeddings=tied)
            model = _parallel(model, tp=2, sequence_parallel=sequence_parallel)
            for name, loss in losses.items():
                longest, where = _longest(model, loss)
                assert longest <= -(-WIDE // 2), f"{family} {name}: {where} makes a tensor {longest} long"


def test_no_tensor_of_the_whole_vocabulary_in_training(ranks2: RankPool) -> None:
    ranks2.run(_vocabulary_in_memory)
