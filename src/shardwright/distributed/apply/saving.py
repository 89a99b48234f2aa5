"""``save_pretrained`` and ``load_adapter`` of a sharded model: all ranks do them, and the folders are plain ones.

transformers' and PEFT's own see this rank's parts of the weights.
"""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from shardwright.distributed.runtime.forward import Around, Forward, original_class, wrap_method
from shardwright.errors import UnsupportedError


def save_and_load_together(model: nn.Module) -> None:
    """Make ``model.save_pretrained`` and ``model.load_adapter`` write and read this model's shards, in place.

    Every rank calls them. With whole weights (``state_dict=``) ``save_pretrained`` writes those as ever.
    """
    for module in model.modules():
        wrap_method(module, "save_pretrained", _Save())
        wrap_method(module, "load_adapter", _LoadAdapter())


class _Save(Around):
    def __call__(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = _by_name(module, "save_pretrained", args, kwargs)
        state = given.get("state_dict")
        if state is not None:
            if not state and given.get("is_main_process") is False:
                return None  # the main process has all of them
            if not any(isinstance(tensor, DTensor) for tensor in state.values()):
                return forward(*args, **kwargs)
            raise UnsupportedError(
                f"The state_dict holds DTensors, and {original_class(module).__name__}.save_pretrained knows of this "
                "rank's parts only. Leave it out, on every rank: model.save_pretrained(folder) gathers the weights one "
                "at a time. Or hand over whole ones: torch.distributed.checkpoint.state_dict.get_model_state_dict("
                "model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))."
            )
        if not any(isinstance(parameter, DTensor) for parameter in module.parameters()):
            return forward(*args, **kwargs)
        # By its name: checkpoints are a layer above, as the user's script is.
        return import_module("shardwright.checkpoint.called").save(module, forward, given)


class _LoadAdapter(Around):
    def __call__(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not any(isinstance(parameter, DTensor) for parameter in module.parameters()):
            return forward(*args, **kwargs)
        given = _by_name(module, "load_adapter", args, kwargs)
        return import_module("shardwright.checkpoint.called").load_adapter(module, given)


def _by_name(module: nn.Module, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    cls: Any = original_class(module)
    names = list(inspect.signature(getattr(cls, method)).parameters)[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}
