"""Every operation that DTensor computes for us, and many that it does not: values and gradients, uneven shards too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from shardwright import ParallelConfig
from shardwright.distributed.runtime.logits import sharded_logits
from shardwright.distributed.runtime.operations import KNOWN
from shardwright.distributed.runtime.regions import sequence_sharded
from shardwright.verify.ranks import RankPool, shared_mesh
from shardwright.verify.step import full

Operation = Callable[[Tensor, Tensor], Any]
IDS = torch.tensor([[0, 3, 10, 5, 7, 2, 1], [9, 9, 0, 4, 10, 6, 8]])


def _in_place(name: str, *args: Any) -> Operation:
    def run(x: Tensor, y: Tensor) -> Tensor:
        copy = x.clone()
        getattr(copy, name)(*args) if args else getattr(copy, name)(y)
        return copy

    return run


def _two(name: str) -> Operation:
    return lambda x, y: getattr(x, name)(y)


OPERATIONS: dict[str, Operation] = {
    **{name: _two(name) for name in ("add", "sub", "mul", "div", "true_divide", "__add__", "__sub__", "__mul__")},
    **{name: _two(name) for name in ("__truediv__", "maximum", "minimum", "eq", "ne", "lt", "le", "gt", "ge")},
    **{f"__{name}__": _two(f"__{name}__") for name in ("eq", "ne", "lt", "le", "gt", "ge")},
    "pow": lambda x, y: x.pow(2), "__pow__": lambda x, y: x**3, "__radd__": lambda x, y: 2 + x + (y + x),
    "__rsub__": lambda x, y: 2 - x - (y - x), "__rmul__": lambda x, y: 2 * x * (y * x),
    "__rtruediv__": lambda x, y: 1 / (x.abs() + 1), "__rdiv__": lambda x, y: y / (x.abs() + 1),
    "__rpow__": lambda x, y: 2**x, "neg": lambda x, y: x.neg(), "__neg__": lambda x, y: -x,
    **{name: (lambda x, y, name=name: getattr(torch, name)(x)) for name in (
        "square", "abs", "exp", "expm1", "tanh", "sigmoid", "sin", "cos", "sign", "nan_to_num")},
    **{name: (lambda x, y, name=name: getattr(torch, name)(x.abs() + 0.5)) for name in (
        "sqrt", "rsqrt", "reciprocal", "log", "log1p", "log2")},
    **{name: (lambda x, y, name=name: getattr(F, name)(x)) for name in (
        "relu", "gelu", "silu", "softplus", "logsigmoid")},
    "clamp": lambda x, y: x.clamp(-0.5, 0.5), "clamp_min": lambda x, y: x.clamp_min(0.1),
    "clamp_max": lambda x, y: x.clamp_max(0.1), "where": lambda x, y: torch.where(y > 0, x, y),
    "masked_fill": lambda x, y: x.masked_fill(y > 0, 1.5), "logical_not": lambda x, y: (x > 0).logical_not(),
    "logical_and": lambda x, y: (x > 0).logical_and(y > 0), "logical_or": lambda x, y: (x > 0).logical_or(y > 0),
    **{name: (lambda x, y, name=name: getattr(torch, name)(x)) for name in ("isnan", "isinf", "isfinite")},
    "dropout": lambda x, y: F.dropout(x, 0.5, training=False),
    "add_": _in_place("add_"), "sub_": _in_place("sub_"), "mul_": _in_place("mul_"), "div_": _in_place("div_", 2.0),
    "clamp_": _in_place("clamp_", -0.5, 0.5), "zero_": lambda x, y: x.clone().zero_() + x, "copy_": _in_place("copy_"),
    "masked_fill_": lambda x, y: x.clone().masked_fill_(y > 0, 2.0), "__iadd__": _in_place("__iadd__"),
    "__isub__": _in_place("__isub__"), "__imul__": _in_place("__imul__"), "__itruediv__": _in_place("__itruediv__", 3),
    "clone": lambda x, y: x.clone(), "detach": lambda x, y: x.detach(), "contiguous": lambda x, y: x.contiguous(),
    "to": lambda x, y: x.to(torch.float64), "type": lambda x, y: x.type(torch.float64), "type_as": _two("type_as"),
    "float": lambda x, y: x.double().float(), "double": lambda x, y: x.double(), "half": lambda x, y: x.half().float(),
    "bfloat16": lambda x, y: x.bfloat16().float(), "cpu": lambda x, y: x.cpu(),
    "view": lambda x, y: (x.view(-1, x.shape[-1]), x.view(2, x.shape[1], -1, 1)), "view_as": _two("view_as"),
    "reshape": lambda x, y: (x.reshape(-1, x.shape[-1]), x.reshape(1, *x.shape)),
    "flatten": lambda x, y: x.flatten(0, 1), "unflatten": lambda x, y: x.unflatten(0, (2, 1)),
    "squeeze": lambda x, y: x[:1].squeeze(0), "unsqueeze": lambda x, y: x.unsqueeze(1),
    "transpose": lambda x, y: x.transpose(1, 2), "permute": lambda x, y: x.permute(2, 0, 1),
    "movedim": lambda x, y: x.movedim(0, 2), "expand": lambda x, y: x[:1].expand(3, -1, -1),
    "expand_as": lambda x, y: x[:1].expand_as(y), "narrow": lambda x, y: x.narrow(1, 1, 4) + x.narrow(2, 0, 1).sum(),
    "select": lambda x, y: x.select(1, 2).sum(-1) + x.select(2, 3).sum(-1), "t": lambda x, y: x[0].t(),
    "__getitem__": lambda x, y: x[:, 1:-1, 2:] * x[:, 1:-1, :1] + x[0, 0, 0] + x[:, -1:, :1],
    "cat": lambda x, y: torch.cat([x, y, x], 1), "stack": lambda x, y: torch.stack([x, y]),
    "repeat": lambda x, y: x.repeat(2, 1, 1), "index_select": lambda x, y: x.index_select(1, torch.tensor([1, 3])),
    **{name: (lambda x, y, name=name: (getattr(x, name)(), getattr(x, name)(-1), getattr(x, name)(1))) for name in (
        "sum", "mean", "var", "std")},
    "max": lambda x, y: (x.max(-1)[0], x.max(1)[0], x.max()), "min": lambda x, y: (x.min(-1)[0], x.min(1)[0], x.min()),
    **{name: (lambda x, y, name=name: (getattr(x, name)(-1), getattr(x, name)(1))) for name in (
        "amax", "amin", "argmax", "argmin", "logsumexp", "softmax", "log_softmax")},
    "norm": lambda x, y: (x.norm(), x.norm(dim=-1), x.norm(dim=1)),
    "vector_norm": lambda x, y: (torch.linalg.vector_norm(x, dim=-1), torch.linalg.vector_norm(x, 1.0, dim=1)),
    "all": lambda x, y: (x > -9).all(), "any": lambda x, y: ((x > 1).any(), (x > 1).any(-1)),
    "topk": lambda x, y: (x.topk(3, -1)[0], x.topk(3, 1)[0]),
    "matmul": lambda x, y: (torch.matmul(x, y.transpose(1, 2)), torch.matmul(y.transpose(1, 2), x)),
    "__matmul__": lambda x, y: x @ y.transpose(1, 2), "mm": lambda x, y: torch.mm(x[0], y[0].t()),
    "bmm": lambda x, y: torch.bmm(x, y.transpose(1, 2)), "linear": lambda x, y: F.linear(x, y[0]),
    **{name: (lambda x, y, name=name: getattr(torch, name)(x) + x) for name in ("zeros_like", "ones_like")},
    "empty_like": lambda x, y: torch.empty_like(x).zero_() + x, "full_like": lambda x, y: torch.full_like(x, 2.0) + x,
    "new_zeros": lambda x, y: x.new_zeros(x.shape) + x, "new_ones": lambda x, y: x.new_ones(x.shape) + x,
    "new_empty": lambda x, y: x.new_empty(x.shape).zero_() + x, "new_full": lambda x, y: x.new_full(x.shape, 2.0) + x,
}  # fmt: skip
ON_WHOLE: dict[str, Operation] = {
    **{name: (lambda x, y, name=name: getattr(F, name)(x, y)) for name in (
        "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "soft_margin_loss", "poisson_nll_loss")},
    "bce": lambda x, y: F.binary_cross_entropy_with_logits(x, y.sigmoid()), "cumsum": lambda x, y: x.cumsum(-1),
    "along the sequence": lambda x, y: x.cumsum(1), "roll": lambda x, y: x.roll(1, 1) + x.flip(1) + x.roll(2, -1),
    "cosine": lambda x, y: F.cosine_embedding_loss(x.flatten(0, 1), y.flatten(0, 1), torch.ones(x[..., 0].numel())),
    "sort": lambda x, y: x.sort(-1)[0], "prod": lambda x, y: x.prod(-1), "item": lambda x, y: x[0, 0].tolist()[3] * x,
    "masked_select": lambda x, y: x.masked_select(y > 0), "quantile": lambda x, y: x.quantile(0.5, -1),
    "norms": lambda x, y: F.layer_norm(x, x.shape[-1:]) + F.rms_norm(x, x.shape[-1:]),
    "by a mask": lambda x, y: x[IDS[:, : x.shape[1]] > 5] if x.shape[1] < 8 else x[y[..., 0] > 0],
    "by a mask and a number": lambda x, y: x[0, y[0, :, 0] > 0], "half": lambda x, y: x.chunk(2)[0] - 2 * x.chunk(2)[1],
    "one of the parts": lambda x, y: x.split([1, 1])[1] + x.split(2, 1)[0][:, :1] * x.split(3, -1)[1][..., :1],
    "each": lambda x, y: sum(row.square().sum() for row in x), "written": _in_place("cumsum_", 1),
}  # fmt: skip


def _outcome(value: Any) -> list[Tensor]:
    return [full(item).float() for item in (value if isinstance(value, tuple) else (value,))]


def _try(operation: Operation, dim: int, shape: tuple[int, ...]) -> str:
    """Empty, or what differs from the operation on a whole tensor."""
    mesh = shared_mesh(ParallelConfig(tp=2))["tp"]
    whole, other = torch.randn(2, *shape, generator=torch.Generator().manual_seed(4)).unbind()
    whole = whole.clone().requires_grad_()
    chunk = whole.detach().chunk(2, dim)[dist.get_rank()].clone().requires_grad_()
    made = sharded_logits(chunk, shape[-1], mesh) if dim == 2 else sequence_sharded(chunk, shape[1], mesh)
    results = []
    for leaf, x in ((whole, whole), (chunk, made)):
        value = operation(x, other)
        pieces = value if isinstance(value, tuple) else (value,)
        trained = [piece for piece in pieces if piece.requires_grad]
        weights = [torch.randn(piece.shape, generator=torch.Generator().manual_seed(5)) for piece in trained]
        for piece, weight in zip(trained, weights, strict=True):
            full_piece: Any = piece.full_tensor() if hasattr(piece, "full_tensor") else piece
            (full_piece * weight).sum().backward(retain_graph=True)
        results.append((_outcome(value), None if leaf.grad is None else leaf.grad))
    (values, grad), (ours, our_grad) = results
    for a, b in zip(values, ours, strict=True):
        if a.shape != b.shape or not torch.allclose(a, b, rtol=1e-5, atol=1e-6):
            return f"value: {tuple(a.shape)} {tuple(b.shape)}"
    if grad is None or our_grad is None:
        return "" if grad is our_grad is None else f"a gradient on one side only: {grad is None} {our_grad is None}"
    return "" if torch.allclose(grad.chunk(2, dim)[dist.get_rank()], our_grad, rtol=1e-5, atol=1e-6) else "gradient"


def _all(dim: int, shape: tuple[int, ...]) -> dict[str, str]:
    found = {}
    for name, operation in {**OPERATIONS, **ON_WHOLE}.items():
        try:
            found[name] = _try(operation, dim, shape)
        except RuntimeError as error:  # collected: one list of all that fail
            found[name] = f"{type(error).__name__}: {error}"
    return {name: problem for name, problem in found.items() if problem}


@pytest.mark.parametrize("dim", [1, 2], ids=["sequence", "vocabulary"])
@pytest.mark.parametrize("shape", [(2, 7, 11), (2, 8, 12)], ids=["uneven", "even"])
def test_operations(ranks2: RankPool, dim: int, shape: tuple[int, ...]) -> None:
    assert ranks2.run(_all, dim, shape) == [{}, {}]


def test_every_known_operation_is_tried() -> None:
    assert set(OPERATIONS) >= KNOWN - {"cuda"}
