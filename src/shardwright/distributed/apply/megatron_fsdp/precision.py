"""Computing in other dtypes than those the model is stored in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shardwright._torch import tree_map
from shardwright.distributed.apply.megatron_fsdp.options import Options
from shardwright.distributed.apply.megatron_fsdp.tensors import local_part


@dataclass(frozen=True)
class Dtypes:
    """Dtypes of the package's buffers; None is the dtype of the model's weights.

    Attributes:
        weights: of the weights that the optimizer works on.
        grads: of the gradients that are summed and accumulated.
    """

    weights: torch.dtype | None
    grads: torch.dtype | None


def set_precision(model: nn.Module, options: Options) -> tuple[Dtypes, dict[str, Tensor]]:
    """Round the weights of ``model`` to the compute dtype, where ``options`` has one, and convert what goes in and out.

    Returns:
        The buffers' dtypes, and this rank's part of the weights as they were before rounding (of those that train and
        are not on meta), by name.
    """
    precision = options.precision
    if precision is None:
        return Dtypes(
            weights=torch.float32 if options.preserve_fp32_weights else None,
            grads=torch.float32 if options.grad_reduce_in_fp32 else None,
        ), {}
    compute, reduce, output = (_dtype(name) for name in (precision.param, precision.reduce, precision.output))
    stored = {param.dtype for param in model.parameters() if param.is_floating_point()}
    if stored == {compute}:
        _convert_output(model, compute, output)
        return Dtypes(weights=None, grads=reduce), {}
    exact = {
        name: local_part(param.detach()).flatten()
        for name, param in model.named_parameters()
        if param.requires_grad and not param.is_meta
    }
    _round(model, compute)
    model.register_forward_pre_hook(_Inputs(compute), with_kwargs=True)
    _convert_output(model, compute, output)
    return Dtypes(weights=stored.pop() if len(stored) == 1 else torch.float32, grads=reduce), exact


def _round(model: nn.Module, dtype: torch.dtype) -> None:
    """Make every floating-point parameter ``dtype``; ties stay tied."""
    rounded: dict[int, nn.Parameter] = {}
    originals = []  # kept alive, so that no id is used twice
    for module in model.modules():
        for name, param in module._parameters.items():
            if param is None or not param.is_floating_point() or id(param) in {id(new) for new in rounded.values()}:
                continue
            if id(param) not in rounded:
                originals.append(param)
                rounded[id(param)] = nn.Parameter(param.detach().to(dtype), requires_grad=param.requires_grad)
            module._parameters[name] = rounded[id(param)]


def _convert_output(model: nn.Module, compute: torch.dtype, output: torch.dtype) -> None:
    if output != compute:
        model.register_forward_hook(_Outputs(output))


class _Inputs:
    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        return _as(args, self.dtype), _as(kwargs, self.dtype)


class _Outputs:
    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        return _as(output, self.dtype)


def _as(tree: Any, dtype: torch.dtype) -> Any:
    return tree_map(lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, tree)


def _dtype(name: str) -> torch.dtype:
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
