"""Logits that nobody has computed yet: a loss computes them a tile of tokens at a time, anything else as a whole.

While a model computes its loss, its head may hand out :class:`TiledLogits` in the place of logits. What the model's
code then does to every logit by itself (a cast, a scale, a soft cap), and how it cuts and lays out tokens (the shift),
is noted. ``F.cross_entropy`` computes it all for one tile after the other. Any other function gets the whole logits, so
the result is right in any case, and only the memory is not saved.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from shardwright._torch import make_wrapper, tree_map_only, without_torch_function
from shardwright.distributed.runtime.context import parts
from shardwright.distributed.runtime.context.base import ContextTensor
from shardwright.distributed.runtime.context.sharded import ContextSharded, handed_out
from shardwright.distributed.runtime.implicit import joined, tensors_in
from shardwright.distributed.runtime.tiles import in_tiles
from shardwright.errors import UnsupportedError

logger = logging.getLogger(__name__)

_EACH = """
    float half bfloat16 double to type type_as clone add sub mul div true_divide neg tanh sigmoid clamp
    clamp_min clamp_max softplus __add__ __sub__ __mul__ __truediv__ __neg__ __radd__ __rsub__ __rmul__
"""
_IN_PLACE = "add_ sub_ mul_ div_ tanh_ clamp_ __iadd__ __isub__ __imul__ __itruediv__"
IN_PLACE = frozenset(_IN_PLACE.split())
EACH = frozenset(_EACH.split()) | IN_PLACE  # each logit by itself
_OF_TOKENS = "contiguous view reshape flatten unflatten __getitem__ narrow squeeze unsqueeze"
OF_TOKENS = frozenset(_OF_TOKENS.split())  # which tokens there are, and how they are laid out
_CASTS = "float half bfloat16 double to type type_as"
CASTS = frozenset(_CASTS.split())
_ABOUT = """
    size dim ndimension numel nelement __len__ is_floating_point is_complex element_size get_device __hash__
    register_hook
"""
ABOUT = frozenset(_ABOUT.split())
_PROPERTIES = """
    shape dtype device ndim layout requires_grad is_leaf is_cuda is_meta is_sparse is_quantized itemsize grad_fn grad
    _base _version output_nr
"""
PROPERTIES = frozenset(getattr(Tensor, name).__get__ for name in _PROPERTIES.split())

Compute = Callable[[Tensor, Mapping[str, Tensor]], Tensor]


@dataclass
class Call:
    """The model's call that logits belong to.

    Attributes:
        tiles: into how many tiles tokens are cut.
        is_open: it still runs. Afterwards the logits are gone.
    """

    tiles: int
    is_open: bool = True


@dataclass(frozen=True)
class Product:
    """What the logits are computed from.

    Attributes:
        hidden: ``[..., features]``, the tokens laid out as the logits' are.
        weights: the head's, as this rank has them.
        compute: from a part of the tokens, and the weights, to their logits.
        steps: what is then done to each logit: functions, and their arguments behind the first.
    """

    hidden: Tensor
    weights: Mapping[str, Tensor]
    compute: Compute
    steps: tuple[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]], ...] = field(default=())

    def of(self, hidden: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        logits = self.compute(hidden, weights)
        for function, args, kwargs in self.steps:
            logits = function(logits, *args, **kwargs)
        return logits


class TiledLogits(Tensor):
    """Logits of which shape, dtype and device are there, and the rest is computed when it is asked for."""

    product: Product
    call: Call
    whole: Tensor | None
    has_views: bool

    @staticmethod
    def make(product: Product, like: Tensor, call: Call) -> TiledLogits:
        """Logits with the shape and dtype of ``like``, which is on meta."""
        trained = any(x.requires_grad for x in (product.hidden, *product.weights.values()))
        made = make_wrapper(
            TiledLogits,
            like.shape,
            dtype=like.dtype,
            device=product.hidden.device,
            requires_grad=trained and torch.is_grad_enabled(),
        )
        made.product, made.call, made.whole, made.has_views = product, call, None, False
        if made.requires_grad:
            made.register_hook(_refuse_gradient)
        return made

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.__name__ in ABOUT or func in PROPERTIES:
            with without_torch_function():
                return func(*args, **kwargs)
        if func is Tensor.data_ptr:
            raise UnsupportedError(
                "A kernel asks for the memory of logits that loss_tiles computes a tile at a time. Leave out "
                "loss_tiles, or the kernel: torch.nn.functional.cross_entropy is what loss_tiles works with."
            )
        if args and isinstance(args[0], TiledLogits):
            result = NotImplemented
            if func is F.cross_entropy:
                result = _cross_entropy(*args, **kwargs)
            elif func.__name__ in EACH:
                result = args[0]._each(func, args[1:], kwargs)
            elif func.__name__ in OF_TOKENS:
                result = args[0]._of_tokens(func, args[1:], kwargs)
            if result is not NotImplemented:
                return result
        return func(*_computed(args, func), **_computed(kwargs, func))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        # Gradients have been seen to by now; what is computed here would have none.
        raise UnsupportedError(f"{func} cannot use logits that loss_tiles computes. Leave loss_tiles out.")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"TiledLogits({tuple(self.shape)}, {self.dtype}, computed a tile at a time)"

    def _each(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        others = tensors_in((args, kwargs))
        if any(x.ndim and max(x.shape[:-1], default=1) > 1 for x in others):
            return NotImplemented  # it says something of single tokens
        like = _on_meta(func, self, args, kwargs)
        if like is None or like.shape != self.shape or _moves(args, kwargs, self.device):
            return NotImplemented
        if func.__name__ in CASTS and like.dtype == self.dtype and not kwargs.get("copy"):
            return self
        hidden = self.product.hidden
        if isinstance(hidden, ContextTensor):
            split = hidden.dealt
            args, kwargs = tree_map_only(Tensor, lambda x: parts.used_in_part(x, split), (args, kwargs))
        product = replace(self.product, steps=(*self.product.steps, (func, args, kwargs)))
        if func.__name__ not in IN_PLACE:
            return TiledLogits.make(product, like, self.call)
        if self.has_views or self.whole is not None:
            raise UnsupportedError(
                f"The model changes its logits in place ({func.__name__}) behind a view of them, which loss_tiles does "
                "not follow. Leave loss_tiles out."
            )
        self.product = product
        return self

    def _of_tokens(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        like = _on_meta(func, self, args, kwargs)
        if like is None or not like.ndim or like.shape[-1] != self.shape[-1]:
            return NotImplemented
        features = self.product.hidden.shape[-1]
        try:
            hidden = func(self.product.hidden, *_last_size(args, self.shape[-1], features), **kwargs)
        except (RuntimeError, IndexError, TypeError):
            return NotImplemented
        if hidden is self.product.hidden:
            return self
        if hidden.shape != (*like.shape[:-1], features):
            return NotImplemented
        self.has_views = True
        return TiledLogits.make(replace(self.product, hidden=hidden), like, self.call)

    def computed(self, reader: str) -> Tensor:
        """The logits themselves, all of them.

        Raises:
            UnsupportedError: the model's call is over.
        """
        if self.whole is None:
            if not self.call.is_open:
                raise UnsupportedError(
                    f"loss_tiles={self.call.tiles} computes the logits of a call with labels a tile at a time, for the "
                    f"loss, and keeps none ({reader} asks for them). Call the model without labels for logits, or "
                    "leave loss_tiles out."
                )
            if not dist.is_initialized() or dist.get_rank() == 0:
                logger.warning("loss_tiles saves nothing: the model's code reads whole logits (%s).", reader)
            self.whole = self.product.of(self.product.hidden, self.product.weights)
        return self.whole


def _refuse_gradient(grad: Tensor) -> None:
    """Our own functions hand no gradient to the stand-in: it goes to what the logits are made of."""
    raise UnsupportedError(
        "The loss is computed by an autograd function of its own. It got logits that loss_tiles computes a tile at a "
        "time, and their gradient would be lost. Leave loss_tiles out, or use torch.nn.functional.cross_entropy."
    )


def _computed(value: Any, func: Callable[..., Any]) -> Any:
    if isinstance(value, TiledLogits):
        return value.computed(func.__name__)
    if isinstance(value, dict):
        return {key: _computed(item, func) for key, item in value.items()}
    return type(value)(_computed(item, func) for item in value) if type(value) in (tuple, list) else value


def _on_meta(func: Callable[..., Any], x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """What ``func`` makes of the shapes and dtypes; None where it makes nothing of them."""

    def meta(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dtype != torch.bool:
            return torch.empty(value.shape, dtype=value.dtype, device="meta")
        if isinstance(value, torch.device):
            return torch.device("meta")
        return type(value)(meta(item) for item in value) if type(value) in (tuple, list) else value

    like, named = torch.empty(x.shape, dtype=x.dtype, device="meta"), {key: meta(item) for key, item in kwargs.items()}
    try:
        result = func(like, *meta(args), **named)
    except (RuntimeError, IndexError, TypeError, NotImplementedError):
        return None
    return result if isinstance(result, Tensor) else None


def _moves(args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device) -> bool:
    """Whether the arguments of a conversion name another device."""
    named = [torch.device(x) for x in (*args, *kwargs.values()) if isinstance(x, (str, torch.device))]
    return any(x != device for x in (*named, *(t.device for t in tensors_in((args, kwargs)) if t.ndim)))


def _last_size(args: tuple[Any, ...], vocabulary: int, features: int) -> tuple[Any, ...]:
    """Sizes for a view of the hidden states, from those for a view of the logits: the last is the vocabulary's."""
    if not args:
        return args
    last = args[-1]
    if type(last) is int and last == vocabulary and all(type(size) is int for size in args):
        return (*args[:-1], features)
    if isinstance(last, (tuple, list)) and last and last[-1] == vocabulary and all(type(x) is int for x in last):
        return (*args[:-1], (*last[:-1], features))
    return args


def _cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    if not isinstance(input, TiledLogits) or not input.call.is_open or input.ndim != 2 or target.ndim != 1:
        return NotImplemented
    if target.is_floating_point() or size_average is not None or reduce is not None:
        return NotImplemented
    product, target = input.product, joined(target)
    dealt = product.hidden if isinstance(product.hidden, ContextTensor) else None
    hidden, split = product.hidden, None
    if dealt is not None:  # each rank computes the losses of its part of the sequence
        hidden, split = dealt.to_local(), dealt.dealt
        target = parts.part(target, split)

    def tile(pieces: Any, weights: Mapping[str, Tensor]) -> Tensor:
        hidden, labels = pieces
        return F.cross_entropy(
            product.of(hidden, weights),
            labels,
            weight=weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction="none",
        )

    losses = torch.cat(in_tiles(tile, (hidden, target), product.weights, input.call.tiles))
    if reduction == "none":
        return losses if dealt is None else dealt.like(losses, dealt.dealt)
    wide = losses.to(torch.promote_types(losses.dtype, torch.float32))
    total = wide.sum() if split is None else parts.summed(wide.sum(), split)
    if reduction == "sum":
        return total.to(losses.dtype)
    kept = target != ignore_index
    counts = kept.to(wide.dtype) if weight is None else weight.to(wide.dtype)[target.where(kept, 0)] * kept
    with torch.no_grad():
        count = counts.sum() if split is None else parts.summed(counts.sum(), split)
    return (total / count).to(losses.dtype)


def handed_out_tiled(logits: TiledLogits) -> TiledLogits:
    """Logits of the inside of a context-parallel model, for a loss around it that runs before the call ends."""
    hidden = logits.product.hidden
    if not isinstance(hidden, ContextSharded) or not hidden.dealt.inside:
        return logits
    split = hidden.dealt

    def leaving(x: Tensor) -> Tensor:
        return parts.leaving(x, split)

    weights, steps = tree_map_only(Tensor, leaving, (dict(logits.product.weights), logits.product.steps))
    product = replace(logits.product, hidden=handed_out(hidden), weights=weights, steps=steps)
    return TiledLogits.make(product, torch.empty(logits.shape, dtype=logits.dtype, device="meta"), logits.call)
