"""Half precision, under autocast too: dtypes and values are those that torch gives on one device."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from steps import assert_same
from test_losses import LOSSES, SOME_IGNORED
from test_operations import OPERATIONS
from tiny_models import batch, build
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from shardwright import ParallelConfig, parallelize
from shardwright.distributed.runtime.dtypes import result_dtype
from shardwright.distributed.runtime.logits import (
    _small_cross_entropy,
    _small_log_softmax,
    _small_log_sum_exp,
    _small_softmax,
    sharded_logits,
)
from shardwright.distributed.runtime.regions import sequence_sharded
from shardwright.verify.ranks import RankPool, shared_mesh
from shardwright.verify.step import full

HALF = [torch.bfloat16, torch.float16]


def _compute(operation: Callable[[Tensor], Any], x: Tensor) -> tuple[list[Tensor], Tensor | None]:
    """The results, and the gradient of ``x`` from weights that are the same for every dtype."""
    leaf = x.detach().requires_grad_()
    value = operation(leaf)
    results = list(value) if isinstance(value, tuple) else [value]
    trained = [piece for piece in results if piece.requires_grad]
    for piece in trained:
        weight = torch.randn(piece.shape, generator=torch.Generator().manual_seed(5))
        (full_of(piece).double() * weight).sum().backward(retain_graph=True)
    return results, leaf.grad


def full_of(x: Any) -> Tensor:
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def _further_off(mine: Tensor, theirs: Tensor, exact: Tensor | None, half: torch.dtype, scale: float) -> bool:
    """Whether ``mine`` is further from the exact value than torch's result and a rounding in its dtype allow.

    Where torch itself has rounded to ``half`` on the way to a result in float32, or the exact value is not known, that
    rounding counts.
    """
    if not theirs.is_floating_point():
        return not torch.equal(mine, theirs)
    known = theirs.double() if exact is None else exact
    scale = max(scale, float(known.abs().max()))
    torchs, rounding = float((theirs.double() - known).abs().max()), torch.finfo(theirs.dtype).eps * scale
    if torchs > 16 * rounding or exact is None:
        rounding = torch.finfo(half).eps * scale
    return not bool(((mine.double() - known).abs() <= 2 * torchs + 2 * rounding).all())


def _differences(dim: int, dtype: torch.dtype, autocast: bool) -> dict[str, str]:
    mesh, rank = shared_mesh(ParallelConfig(tp=2))["tp"], dist.get_rank()
    whole = 3 * torch.randn(2, 15, 99, generator=torch.Generator().manual_seed(4))
    other = torch.randn(2, 15, 99, generator=torch.Generator().manual_seed(6))
    whole, other = whole.to(dtype), other.to(dtype)
    operations = {name: (lambda x, op=op, y=other: op(x, y.to(x.dtype))) for name, op in OPERATIONS.items()}
    losses = {f"loss: {name}": op for name, op in LOSSES.items()}
    found = {}
    for name, operation in {**operations, **(losses if dim == 2 else {})}.items():
        found[name] = _difference(operation, whole, dim, mesh, rank, autocast)
    return {name: problem for name, problem in found.items() if problem}


def _difference(operation: Any, whole: Tensor, dim: int, mesh: Any, rank: int, autocast: bool) -> str:
    def ours(chunk: Tensor) -> Any:
        made = sharded_logits(chunk, 99, mesh) if dim == 2 else sequence_sharded(chunk, 15, mesh)
        return operation(made)

    try:
        with torch.autocast("cpu", dtype=whole.dtype, enabled=autocast):
            theirs, their_grad = _compute(operation, whole)
    except (RuntimeError, TypeError, IndexError):
        return ""  # torch itself does not compute it in this dtype
    exact: list[Any]
    try:
        exact, exact_grad = _compute(operation, whole.double())
    except (RuntimeError, TypeError, IndexError):  # not in float64: class weights are in float32
        exact, exact_grad = [None] * len(theirs), None
    with torch.autocast("cpu", dtype=whole.dtype, enabled=autocast):
        mine, my_grad = _compute(ours, whole.chunk(2, dim)[rank].clone())
    scale = float(whole.abs().max())
    for a, b, right in zip(mine, theirs, exact, strict=True):
        if a.dtype != b.dtype:
            return f"{a.dtype} in place of {b.dtype}"
        if _further_off(full(a), b, right, whole.dtype, scale):
            return f"{full(a)}, where torch has {b}"
    if (my_grad is None) != (their_grad is None):
        return "a gradient on one side only"
    if my_grad is None or their_grad is None:
        return ""
    right = None if exact_grad is None else exact_grad.chunk(2, dim)[rank]
    off = _further_off(my_grad, their_grad.chunk(2, dim)[rank], right, whole.dtype, scale=0.0)
    return f"gradient {my_grad}" if off else ""


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("dtype", HALF, ids=["bf16", "fp16"])
@pytest.mark.parametrize("dim", [1, 2], ids=["sequence", "vocabulary"])
def test_operations_in_half_precision(ranks2: RankPool, dim: int, dtype: torch.dtype, autocast: bool) -> None:
    for differences in ranks2.run(_differences, dim, dtype, autocast):
        assert not differences


def _note_dtype(seen: dict[str, torch.dtype], name: str, module: nn.Module, args: Any, output: Any) -> None:
    if isinstance(output, Tensor):
        seen[name] = output.dtype


def _train_with_autocast(dtype: torch.dtype, sequence_parallel: bool) -> None:
    """A user's loss and the model's own, under autocast, against one process."""
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = ParallelConfig(tp=2, sequence_parallel=sequence_parallel)
    reference, model = build("gpt2", **sizes), parallelize(build("gpt2", **sizes), config, shared_mesh(config))
    ids = batch(3)["input_ids"]
    exact = reference(input_ids=ids, labels=ids)
    outputs = []
    dtypes: list[dict[str, torch.dtype]] = [{}, {}]
    for each, seen in zip((model, reference), dtypes, strict=True):
        for name, module in each.named_modules():
            module.register_forward_hook(partial(_note_dtype, seen, name))
        with torch.autocast("cpu", dtype=dtype):
            output = each(input_ids=ids, labels=ids, output_hidden_states=True)
            mean = F.cross_entropy(output.logits.flatten(0, 1), SOME_IGNORED.flatten())
            (output.loss + mean).backward()
            of_whole = F.cross_entropy(full(output.logits).flatten(0, 1), SOME_IGNORED.flatten())
        assert mean.dtype == output.loss.dtype == torch.float32
        assert_same(mean, of_whole, "the loss of the same logits, whole")
        outputs.append(output)
    assert dtypes[0] == dtypes[1]
    mine, theirs = outputs
    assert mine.logits.dtype == theirs.logits.dtype
    assert [x.dtype for x in mine.hidden_states] == [x.dtype for x in theirs.hidden_states]
    assert abs(mine.loss - exact.loss) <= 2 * abs(theirs.loss - exact.loss) + torch.finfo(dtype).eps * exact.loss


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tp", "tp+sp"])
@pytest.mark.parametrize("dtype", HALF, ids=["bf16", "fp16"])
def test_autocast(ranks2: RankPool, dtype: torch.dtype, sequence_parallel: bool) -> None:
    ranks2.run(_train_with_autocast, dtype, sequence_parallel)


def _large_vocabulary() -> None:
    """Exponentials of 150000 entries add up to more than float16 holds."""
    mesh, rank = shared_mesh(ParallelConfig(tp=2))["tp"], dist.get_rank()
    whole = torch.randn(4, 150_000, generator=torch.Generator().manual_seed(0)).half()
    target = torch.tensor([0, 149_999, 75_000, 12])
    logits = sharded_logits(whole.chunk(2, -1)[rank].clone(), 150_000, mesh)
    for loss in (
        lambda x: F.cross_entropy(x, target),
        lambda x: x.logsumexp(-1).square().mean(),
        lambda x: F.nll_loss(x.log_softmax(-1), target),
        lambda x: x.softmax(-1).square().sum(-1).mean(),
        lambda x: x.sum(),
    ):
        mine, theirs = full(loss(logits)), loss(whole)
        assert mine.isfinite()
        assert mine.dtype == theirs.dtype == torch.float16
        torch.testing.assert_close(mine, theirs, rtol=2e-3, atol=1e-7)


def test_float16_with_a_large_vocabulary(ranks2: RankPool) -> None:
    ranks2.run(_large_vocabulary)


def test_the_lists_of_cuda_are_followed() -> None:
    """CUDA's autocast lists differ from the CPU's: what torch says of tensors that pretend to be on a GPU."""
    functions = (_small_cross_entropy, _small_log_softmax, _small_softmax, _small_log_sum_exp)
    with FakeTensorMode():
        x = torch.empty(3, 7, device="cuda", dtype=torch.float16)
        assert [result_dtype(function, x) for function in functions] == [torch.float16] * 4
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", torch.float16)
        try:
            assert [result_dtype(function, x) for function in functions] == [torch.float32] * 4
        finally:
            torch.set_autocast_enabled("cuda", False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = torch.empty(3, 7, dtype=torch.bfloat16)
        assert [result_dtype(function, x) for function in functions] == [torch.float32] + [torch.bfloat16] * 3
