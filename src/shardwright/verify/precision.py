"""A second opinion in float64, for models that amplify float32 rounding."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig


class _Float64(TorchFunctionMode):
    """Reads float32, where model code writes it down (a norm, a softmax, a router), as float64."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is torch.Tensor.float:
            return args[0].double()
        widened = tuple(_widen(value) for value in args)
        return function(*widened, **{name: _widen(value) for name, value in (kwargs or {}).items()})


def _widen(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def prepared_for(dtype: torch.dtype, model: nn.Module) -> nn.Module:
    """``model`` cast to ``dtype``; in float64 without grouped matrix products, which torch has in float32 at most."""
    if dtype == torch.float64:
        # Not the model's own set_experts_implementation, which passes over towers (Dots 3 Note's).
        for part in model.modules():
            if isinstance(config := part.__dict__.get("config"), PreTrainedConfig):
                config._experts_implementation = "eager"
    return model.to(dtype)


@contextlib.contextmanager
def computing_in(dtype: torch.dtype) -> Iterator[None]:
    """Compute in ``dtype``: float32 is torch's own way, float64 is float64 throughout.

    A model that is merely cast to float64 still rounds to float32 wherever its code says so, and what is lost there
    cannot be told from a small mistake.
    """
    if dtype == torch.float32:
        yield
        return
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Float64():
            yield
    finally:
        torch.set_default_dtype(default)
