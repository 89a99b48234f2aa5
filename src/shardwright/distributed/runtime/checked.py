"""Parameters and gradients for code outside of the model: a number that is only a part of one is refused.

An optimizer, a log or a regulariser computes with a model's parameters and gradients, which are DTensors. Most of it
torch does as on one process. Two things it does not. A norm or a sum of shards is *partial*, and torch hands out this
rank's part as a Python number, without a word. And operations for which DTensor has no rule end in an error that says
nothing of the optimizer that asked for them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shardwright._torch import take_in_groups, without_torch_function
from shardwright.distributed.runtime.drawn import draw_whole, is_drawn
from shardwright.distributed.runtime.implicit import ImplicitDTensor, OwnRules, joined, tensors_in
from shardwright.distributed.runtime.operations import writes
from shardwright.distributed.runtime.written import (
    is_alias,
    is_whole_write,
    note_copies,
    refuse_lost_write,
    set_data,
    sets_data,
    write_whole,
)
from shardwright.errors import ShardwrightError, UnsupportedError

_NUMBERS = {
    *(Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__bool__, Tensor.__int__, Tensor.__float__),
    *(Tensor.__complex__, Tensor.__index__, Tensor.__format__),
}
_OPTIMIZERS = (
    "If an optimizer asked for it: of torch.optim, SGD, Adagrad, Adadelta, Adam, AdamW, Adamax, NAdam, RAdam, RMSprop, "
    "ASGD and Muon work, with foreach or without, Adam and AdamW with fused=True, and Rprop with foreach=False. "
    "Adafactor does not, nor transformers', nor those of bitsandbytes, nor LBFGS where a parameter's rows do not "
    "divide among the ranks. Sharding divides the memory of AdamW's state by the number of ranks."
)


class CheckedDTensor(DTensor):
    """A parameter, its gradient, or what is computed from them."""

    __slots__ = ()
    goes_first = False  # whether a class that checks, too, leaves a call with both to this one

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(cls._leaves_to(kind) for kind in types):
            return NotImplemented  # that class is asked next
        kwargs = kwargs or {}
        if func in _NUMBERS and not (func is Tensor.__format__ and args[0].ndim):  # torch shows that as what it is
            if args[0].dtype is torch.bool and not args[0].ndim:  # of any() or all(); nn.init.trunc_normal_ asks for it
                return func(joined(args[0]), *args[1:], **kwargs)
            _refuse_part(args[0])
            return func(args[0].to_local(), *args[1:], **kwargs)
        refuse_lost_write(func, args)
        if sets_data(func) and isinstance(args[0], DTensor):
            return set_data(*args)
        if is_drawn(func, kwargs):
            return draw_whole(func, args, kwargs)
        if is_whole_write(func, args, kwargs):
            return write_whole(func, args, kwargs)
        if not writes(func) and _are_numbers_elsewhere(tensors_in((args, kwargs))):
            return func(*joined(args), **joined(kwargs))
        with without_torch_function():
            try:
                result = cls.computed(func, args, kwargs)
            except (ShardwrightError, torch.OutOfMemoryError):
                raise
            except NotImplementedError as error:  # DTensor has no rule for it
                raise UnsupportedError(_cannot(func, error)) from error
            except RuntimeError as error:
                if not _works_whole(func, args, kwargs):
                    raise
                raise UnsupportedError(_cannot(func, error)) from error
        if is_alias(func):
            note_copies(result, args[0])
        return result

    @classmethod
    def _leaves_to(cls, kind: type) -> bool:
        if issubclass(kind, CheckedDTensor):
            return kind.goes_first and not cls.goes_first
        return issubclass(kind, (ImplicitDTensor, OwnRules))

    @classmethod
    def computed(cls, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What torch makes of it; called where no class is asked any more."""
        with _as_dtensors(tensors_in((args, kwargs))):
            return checked(func(*args, **kwargs))

    @staticmethod
    def __tensor_unflatten__(inner: Any, meta: Any, size: Any, stride: Any) -> DTensor:
        # A compiled block gets its parameters so, and asks for the class that it has seen.
        return checked(DTensor.__tensor_unflatten__(inner, meta, size, stride))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        with _as_dtensors([self]):  # whose clone is of its own class, which torch asks for
            return checked(copy.deepcopy(self, memo))

    def __reduce_ex__(self, protocol: Any) -> Any:
        # What is saved can be loaded without Shardwright.
        with _as_dtensors([self]):
            return self.__reduce_ex__(protocol)


@contextmanager
def _as_dtensors(tensors: list[Tensor]) -> Iterator[None]:
    """Those of ``tensors`` that are checked are of torch's own class inside; the classes have the same layout.

    Modes that look at operations (torch's ``CommDebugMode``) know DTensors by their class.
    """
    checked: list[tuple[Any, Any]] = [(each, type(each)) for each in tensors if isinstance(each, CheckedDTensor)]
    for tensor, _ in checked:
        tensor.__class__ = DTensor
    try:
        yield
    finally:
        for tensor, cls in checked:
            tensor.__class__ = cls


take_in_groups(CheckedDTensor)


def check_parameters(model: nn.Module) -> None:
    """Make the parameters of ``model`` that are DTensors of torch's own class :class:`CheckedDTensor`, in place."""
    for param in model.parameters():
        checked(param)


def checked(value: Any) -> Any:
    """``value`` with what is of torch's own class in it made :class:`CheckedDTensor`, in place."""
    if type(value) is DTensor:
        value.__class__ = CheckedDTensor
    elif type(value) in (tuple, list):
        for item in value:
            checked(item)
    return value


def _are_numbers_elsewhere(tensors: list[Tensor]) -> bool:
    """Whether DTensors of no dimension meet plain tensors, or each other on different meshes.

    A penalty on weights that is added to a loss is such a number, and so are its parts.
    """
    sharded = [x for x in tensors if isinstance(x, DTensor)]
    alone = len(sharded) == len(tensors) and all(x.device_mesh == sharded[0].device_mesh for x in sharded)
    return bool(sharded) and not alone and all(x.ndim == 0 for x in sharded)


def _refuse_part(x: DTensor) -> None:
    mesh = x.device_mesh
    if all(placement.is_replicate() or mesh.size(axis) == 1 for axis, placement in enumerate(x.placements)):
        return
    raise UnsupportedError(
        f"A number is asked of a tensor of shape {tuple(x.shape)} that is spread over ranks ({x.placements}): what is "
        "here is this rank's part of it. Make it whole first, on every rank, since ranks exchange their parts: "
        "x.full_tensor().item() for x.item(). The norm of every gradient, with one exchange: "
        "shardwright.gradient_norms(model). What torch.nn.utils.clip_grad_norm_ and get_total_norm return is whole "
        "already, but for the infinity norm. " + _OPTIMIZERS
    )


def _works_whole(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether plain tensors of the same shapes can be computed with so."""
    try:
        func(*_on_meta(args), **_on_meta(kwargs))
    except (RuntimeError, NotImplementedError, TypeError, ValueError):
        return False
    return True


def _on_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.empty(value.shape, dtype=value.dtype, device="meta", requires_grad=value.requires_grad)
    if isinstance(value, dict):
        return {key: _on_meta(item) for key, item in value.items()}
    return type(value)(_on_meta(item) for item in value) if type(value) in (tuple, list) else value


def _cannot(func: Callable[..., Any], error: Exception) -> str:
    reason = str(error).splitlines()[0].rstrip(".")
    return (
        f"DTensor cannot compute {func.__name__} on sharded parameters or gradients ({reason}). {_OPTIMIZERS} In code "
        "of your own make tensors whole first, on every rank: x.full_tensor()."
    )
