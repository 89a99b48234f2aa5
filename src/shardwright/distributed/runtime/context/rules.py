"""What is computed of a tensor that is split along the sequence, each rank on its part.

Operations are known by name. What is not listed here is computed on whole tensors, alike on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from shardwright._torch import tree_map_only, without_torch_function
from shardwright.distributed.runtime.context import parts
from shardwright.distributed.runtime.context.base import ContextTensor
from shardwright.distributed.runtime.context.parts import Split
from shardwright.distributed.runtime.context.shapes import exchanged, expanded, indexed, narrowed, viewed
from shardwright.distributed.runtime.dtypes import HALF
from shardwright.distributed.runtime.implicit import tensors_in

Arguments = tuple[Any, ...]
Rule = Callable[[Callable[..., Any], Arguments, dict[str, Any]], Any]

_EACH = """
    add sub mul div true_divide neg pow square sqrt rsqrt reciprocal abs exp exp2 expm1 log log1p log2 tanh sigmoid
    relu relu6 gelu silu mish elu selu celu leaky_relu hardtanh hardswish hardsigmoid softplus softsign logsigmoid
    sin cos tan
    erf clamp clamp_min clamp_max where masked_fill eq ne lt le gt ge logical_not logical_and logical_or logical_xor
    bitwise_and bitwise_or bitwise_not isnan isinf isfinite maximum minimum sign nan_to_num floor ceil round trunc fmod
    remainder floor_divide lerp addcmul addcdiv dropout rsub subtract multiply divide negative threshold xlogy
    __add__ __sub__ __mul__ __truediv__ __floordiv__ __mod__ __pow__ __neg__ __eq__ __ne__ __lt__ __le__ __gt__ __ge__
    __and__ __or__ __xor__ __invert__ __abs__ __radd__ __rsub__ __rmul__ __rtruediv__ __rpow__ __rdiv__ __rand__ __ror__
    detach clone contiguous to type type_as float half double bfloat16 int long bool cpu cuda requires_grad_
    zeros_like ones_like empty_like full_like binary_cross_entropy_with_logits
"""
_ALONG = "softmax log_softmax softmin sort argsort topk cumsum cumprod cummax cummin flip logcumsumexp roll"
_REDUCED = (
    "sum mean var std amax amin max min argmax argmin logsumexp prod all any norm vector_norm median count_nonzero"
)
_LIKE = "new_zeros new_ones new_empty new_full new_tensor"
_VIEWS = "view reshape flatten unflatten squeeze unsqueeze view_as reshape_as"


def each(func: Callable[..., Any], args: Arguments, kwargs: dict[str, Any]) -> Any:
    """Something that is done to every element; other tensors are broadcast as usual."""
    first = next(x for x in tensors_in((args, kwargs)) if isinstance(x, ContextTensor))
    behind = first.ndim - first.dealt.dim
    local = _Local(first.dealt, behind)
    args, kwargs = local.of(args), local.of(kwargs)
    if local.failed:
        return NotImplemented
    return _wrapped(func(*args, **kwargs), first, lambda result: first.dealt.at(result.ndim - behind))


def in_place(func: Callable[..., Any], args: Arguments, kwargs: dict[str, Any]) -> Any:
    """``add_`` and its like: what the function of that name without the last letter makes is copied over."""
    x = args[0]
    name = func.__name__.removeprefix("__i").removesuffix("_") if not func.__name__.startswith("__") else None
    plain = getattr(Tensor, name if name is not None else func.__name__.replace("__i", "__", 1))
    new = each(plain, args, kwargs)
    if new is NotImplemented or not isinstance(x, ContextTensor) or new.dealt != x.dealt:
        return NotImplemented
    with without_torch_function():
        x.copy_(new.to(x.dtype) if new.dtype != x.dtype else new)
    return x


class _Local:
    """This rank's part of arguments whose positions are ``behind`` dims before the end.

    Attributes:
        failed: some argument does not fit.
    """

    def __init__(self, split: Split, behind: int) -> None:
        self.split, self.behind, self.failed = split, behind, False

    def of(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, dict):
            return {key: self.of(item) for key, item in value.items()}
        return type(value)(self.of(item) for item in value) if type(value) in (tuple, list) else value

    def _tensor(self, x: Tensor) -> Any:
        split = self.split.at(x.ndim - self.behind)
        if isinstance(x, ContextTensor):
            self.failed |= x.dealt != split
            return x.inside
        if x.ndim < self.behind or x.shape[split.dim] == 1:
            return parts.used_in_part(x, split)
        self.failed |= isinstance(x, DTensor) or x.shape[split.dim] != split.total
        return x if self.failed else parts.part(x, split)


def _wrapped(
    result: Any,
    x: ContextTensor,
    split: Callable[[Tensor], Split],
    change: Callable[[Tensor, Split], Tensor] = lambda part, split: part,
) -> Any:
    """What a function made of ``x.inside``, as a tensor of which this rank has that; tuples by their items."""
    if isinstance(result, Tensor):
        return x.like(change(result, x.dealt), split(result))
    if isinstance(result, (tuple, list)):
        items = [_wrapped(item, x, split, change) for item in result]
        return type(result)(items)  # torch.max's kind of tuple, too
    return result


def _dim(kwargs: dict[str, Any], others: Arguments, place: int = 0) -> int:
    """The dim that a function works along: named, in its place among the other arguments, or the first."""
    found: int = kwargs["dim"] if "dim" in kwargs else others[place] if len(others) > place else 0
    return found


def _dims(name: str, args: Arguments, kwargs: dict[str, Any], ndim: int) -> tuple[int, ...] | None:
    """The dims that a function is told to work along; None where it is told none."""
    place = 2 if name in ("norm", "vector_norm", "topk", "roll") else 1
    told = kwargs.get("dim", kwargs.get("axis", kwargs.get("dims")))
    if told is None:
        told = args[place] if len(args) > place else -1 if name in ("topk", "sort", "argsort") else None
    if isinstance(told, (bool, torch.dtype)):
        return None
    items: list[Any] = list(told) if isinstance(told, (tuple, list)) else [told]
    return tuple(item % ndim for item in items) if all(type(item) is int for item in items) else None


def along(func: Callable[..., Any], args: Arguments, kwargs: dict[str, Any]) -> Any:
    """Something along dims of which none is the sequence."""
    x = args[0]
    if not isinstance(x, ContextTensor) or len(tensors_in((args, kwargs))) > 1:
        return NotImplemented
    dims = _dims(func.__name__, args, kwargs, x.ndim)
    if dims is None or x.dealt.dim in dims:
        return NotImplemented
    return _wrapped(func(x.inside, *args[1:], **kwargs), x, lambda result: x.dealt)


def reduced(func: Callable[..., Any], args: Arguments, kwargs: dict[str, Any]) -> Any:
    """A reduction, over the sequence too where the ranks' results can be put together."""
    x = args[0]
    if not isinstance(x, ContextTensor) or len(tensors_in((args, kwargs))) > 1:
        return NotImplemented
    dims = _dims(func.__name__, args, kwargs, x.ndim)
    if dims is None or x.dealt.dim in dims:
        return _over_the_sequence(func, x, args[1:], kwargs, dims)
    before = sum(dim < x.dealt.dim for dim in dims)

    def split(result: Tensor) -> Split:
        return x.dealt.at(x.dealt.dim - (0 if result.ndim == x.ndim else before))

    return _wrapped(func(x.inside, *args[1:], **kwargs), x, split)


def _over_the_sequence(
    func: Callable[..., Any], x: ContextTensor, args: Arguments, kwargs: dict[str, Any], dims: tuple[int, ...] | None
) -> Any:
    name = func.__name__
    if name in ("any", "all") and not args and not kwargs:
        flags = x.inside != 0
        hits = (flags if name == "any" else ~flags).sum()
        count = parts.summed(hits, x.dealt)
        return (count > 0) if name == "any" else count == 0
    if name not in ("sum", "mean") or (name == "mean" and not x.is_floating_point()):
        return NotImplemented
    dtype = kwargs.get("dtype") or x.dtype
    inside = x.inside.float() if dtype in HALF else x.inside
    kwargs = {key: value for key, value in kwargs.items() if key != "dtype"}
    total = parts.summed(torch.sum(inside, *args, **kwargs), x.dealt)
    if name == "mean":
        total = total / (x.numel() if dims is None else prod(x.shape[dim] for dim in dims))
    return total.to(dtype) if dtype in HALF else total


def by_features(func: Callable[..., Any], args: Arguments, kwargs: dict[str, Any]) -> Any:
    """A layer that works on the last dims of its first argument, behind the sequence; the others are its weights."""
    x, *others = args
    if not isinstance(x, ContextTensor) or any(
        isinstance(item, ContextTensor) for item in tensors_in((others, kwargs))
    ):
        return NotImplemented
    if func.__name__ in ("layer_norm", "rms_norm"):
        shape = others[0] if others else kwargs["normalized_shape"]
        features = len(shape) if isinstance(shape, (tuple, list)) else 1
    else:  # a product with a matrix
        matrix = next(iter(tensors_in((others, kwargs))), None)
        features = 1 if matrix is not None and matrix.ndim <= 2 else x.ndim
    if x.dealt.dim >= x.ndim - features:
        return NotImplemented
    weights = [_weight(item, x.dealt) for item in others]
    named = {key: _weight(item, x.dealt) for key, item in kwargs.items()}
    if x.dealt.inside or not any(isinstance(item, DTensor) for item in tensors_in((others, kwargs))):
        return _wrapped(func(x.inside, *weights, **named), x, lambda result: x.dealt)
    if x.meshes.both is not None:
        return NotImplemented
    # A weight that the model shards, read by code around it: its gradient is averaged, as that of the inside is.
    weights, named = tree_map_only(Tensor, lambda w: _averaged(w, x.dealt), (weights, named))
    made = func(parts.arriving(x.inside, x.dealt), *weights, **named)
    return _wrapped(made, x, lambda result: x.dealt, parts.leaving)


def _averaged(weight: Tensor, split: Split) -> Tensor:
    return weight if isinstance(weight, DTensor) else parts.arriving(weight, split)


def _weight(value: Any, split: Split) -> Any:
    return parts.used_in_part(value, split) if isinstance(value, Tensor) and not isinstance(value, DTensor) else value


def picked(func: Callable[..., Any], args: Arguments, kwargs: dict[str, Any]) -> Any:
    """``gather`` and ``take_along_dim`` along another dim than the sequence."""
    x, *others = args
    if kwargs or len(others) != 2 or not isinstance(x, ContextTensor):
        return NotImplemented
    dim, index = others if func.__name__ == "gather" else others[::-1]
    if type(dim) is not int or dim % x.ndim == x.dealt.dim or index.shape[x.dealt.dim] != x.dealt.total:
        return NotImplemented
    local = _Local(x.dealt, x.ndim - x.dealt.dim)
    index = local.of(index)
    if local.failed:
        return NotImplemented
    return x.like(func(x.inside, *((dim, index) if func.__name__ == "gather" else (index, dim))), x.dealt)


def together(func: Callable[..., Any], args: Arguments, kwargs: dict[str, Any]) -> Any:
    """``cat``: of features, or of runs that are dealt out alike."""
    tensors, dim = args[0], _dim(kwargs, args[1:])
    first = next(x for x in tensors if isinstance(x, ContextTensor))
    dim, split = dim % first.ndim, first.dealt
    if dim != split.dim:
        local = _Local(split, first.ndim - split.dim)
        pieces = local.of(list(tensors))
        return NotImplemented if local.failed else first.like(torch.cat(pieces, dim), split)
    alike = all(isinstance(x, ContextTensor) and replace(x.dealt, outer=split.outer) == split for x in tensors)
    if not alike or first.dealt.dim:
        return NotImplemented
    outer = sum(x.dealt.outer for x in tensors)
    return first.like(torch.cat([x.inside for x in tensors], dim), replace(split, outer=outer))


def stacked(func: Callable[..., Any], args: Arguments, kwargs: dict[str, Any]) -> Any:
    tensors, dim = args[0], _dim(kwargs, args[1:])
    first = next(x for x in tensors if isinstance(x, ContextTensor))
    local = _Local(first.dealt, first.ndim - first.dealt.dim)
    pieces = local.of(list(tensors))
    if local.failed:
        return NotImplemented
    dim %= first.ndim + 1
    return first.like(torch.stack(pieces, dim), first.dealt.at(first.dealt.dim + (dim <= first.dealt.dim)))


def separated(func: Callable[..., Any], args: Arguments, kwargs: dict[str, Any]) -> Any:
    """``split``, ``chunk``, ``unbind`` and ``select`` along another dim than the sequence."""
    x, *others = args
    by_itself = func.__name__ in ("unbind", "select")
    dim = _dim(kwargs, tuple(others), 0 if by_itself else 1)
    if not isinstance(x, ContextTensor) or dim % x.ndim == x.dealt.dim:
        return NotImplemented
    fewer = by_itself and dim % x.ndim < x.dealt.dim
    return _wrapped(func(x.inside, *others, **kwargs), x, lambda result: x.dealt.at(x.dealt.dim - fewer))


def padded(func: Callable[..., Any], args: Arguments, kwargs: dict[str, Any]) -> Any:
    x, amounts, *others = args
    if not isinstance(x, ContextTensor) or x.kind is not None or len(amounts) > 2 * (x.ndim - 1 - x.dealt.dim):
        return NotImplemented
    return x.like(func(x.inside, amounts, *others, **kwargs), x.dealt)


def one_hot(func: Callable[..., Any], args: Arguments, kwargs: dict[str, Any]) -> Any:
    classes = kwargs["num_classes"] if "num_classes" in kwargs else args[1] if len(args) > 1 else -1
    if not isinstance(args[0], ContextTensor) or classes < 1:
        return NotImplemented
    return args[0].like(func(args[0].inside, *args[1:], **kwargs), args[0].dealt)


def unlike(func: Callable[..., Any], args: Arguments, kwargs: dict[str, Any]) -> Any:
    """A new tensor with a size of its own."""
    return func(args[0].to_local().detach(), *args[1:], **kwargs)


def _named(rule: Rule, names: str | Iterable[str]) -> dict[str, Rule]:
    return dict.fromkeys(names.split() if isinstance(names, str) else names, rule)


RULES: dict[str, Rule] = {
    **_named(each, _EACH),
    **_named(along, _ALONG),
    **_named(reduced, _REDUCED),
    **_named(unlike, _LIKE),
    **_named(viewed, _VIEWS),
    **_named(exchanged, "transpose permute t swapaxes"),
    **_named(expanded, "expand expand_as"),
    **_named(indexed, "__getitem__"),
    **_named(narrowed, "narrow"),
    **_named(by_features, "linear layer_norm rms_norm matmul __matmul__"),
    **_named(picked, "gather take_along_dim"),
    **_named(together, "cat concat concatenate"),
    **_named(stacked, "stack"),
    **_named(separated, "split chunk unbind select"),
    **_named(padded, "pad"),
    **_named(one_hot, "one_hot"),
    **_named(in_place, "add_ sub_ mul_ div_ clamp_ masked_fill_ tanh_ __iadd__ __isub__ __imul__ __itruediv__"),
}
