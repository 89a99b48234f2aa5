"""Quantized weights: which of them can be sharded, tried against one process; the rest is refused before any change.

FSDP2 gathers a parameter's bytes, so a format works with it that keeps all it needs in parameters of its own, or in its
module: bitsandbytes' 4-bit weights, with LoRA adapters too, and float8 weights that nothing casts. bitsandbytes' 8-bit
weights keep their scales as attributes of the parameter, which the gathered copy lacks. Tensor parallelism would cut
across the blocks in which a format scales its values. Measured with bitsandbytes 0.50.2 on CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from shardwright._torch import is_traceable_wrapper_subclass
from shardwright.errors import UnsupportedError

FOUR_BIT, EIGHT_BIT, FLOAT8 = "bitsandbytes 4-bit", "bitsandbytes 8-bit", "float8"
_OF_BITSANDBYTES = {"Params4bit": FOUR_BIT, "Int8Params": EIGHT_BIT}
_SHARDED = {FOUR_BIT, FLOAT8}  # what FSDP2 shards
_WHAT_WORKS = (
    f"What works is FSDP2 (tp=1) with {FOUR_BIT} weights, and with {FLOAT8} weights that precision does not cast"
)


def check_quantized(model: nn.Module, *, tp: int, engine: str, casts: bool) -> None:
    """Raise UnsupportedError where ``model`` has quantized weights that this combination does not compute exactly.

    Args:
        tp: tensor-parallel ranks.
        engine: ``"fsdp2"``, ``"megatron_fsdp"``, or empty where nothing is sharded over data-parallel ranks.
        casts: whether parameters are cast to another dtype before they are computed with.
    """
    found = quantized_weights(model)
    for kind, names in found.items():
        problem = None
        if tp > 1:
            problem = f"tensor parallelism (tp={tp}) would cut across the blocks in which their values are scaled"
        elif engine == "megatron_fsdp":
            problem = "Megatron-FSDP keeps all weights in buffers of one floating-point dtype"
        elif engine and kind not in _SHARDED:
            problem = "the copies that FSDP2 gathers are not known to keep what belongs to them"
        elif engine and casts and kind == FLOAT8:
            problem = "precision would cast them without their scales"
        if problem is not None:
            raise UnsupportedError(
                f"This {type(model).__name__} is quantized ({kind}: {names[0]}"
                + (f" and {len(names) - 1} more" if len(names) > 1 else "")
                + f"), and {problem}. {_WHAT_WORKS}. Otherwise load the model without quantization."
            )


def quantized_weights(model: nn.Module) -> dict[str, list[str]]:
    """Kind of quantization -> names of the weights, or of the modules of a transformers model that was loaded so."""
    found: dict[str, list[str]] = {}
    for name, param in model.named_parameters():
        if (kind := _kind(param)) is not None:
            found.setdefault(kind, []).append(name)
    for name, module in model.named_modules():
        # transformers notes how it has loaded a model. Some formats (GPTQ, AWQ) keep their weights in buffers.
        quantizer = vars(module).get("hf_quantizer")
        if quantizer is not None and not found:
            method = quantizer.quantization_config.quant_method
            found[str(getattr(method, "value", method))] = [name or type(module).__name__]
    return found


def _kind(param: Any) -> str | None:
    if isinstance(param, DTensor):
        param = param.to_local()
    cls = type(param)
    if cls.__module__.split(".")[0] == "bitsandbytes":
        return _OF_BITSANDBYTES.get(cls.__name__, f"bitsandbytes {cls.__name__}")
    if is_traceable_wrapper_subclass(param):
        return f"{cls.__module__}.{cls.__name__}"
    if param.element_size() > 1 or param.dtype == torch.bool:
        return None
    return FLOAT8 if param.is_floating_point() else str(param.dtype).removeprefix("torch.")
