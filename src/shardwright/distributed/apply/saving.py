"""``model.save_pretrained`` of a sharded model: transformers' own would write a folder without weights."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from shardwright.distributed.runtime.forward import Around, Forward, original_class, wrap_method
from shardwright.errors import UnsupportedError


def refuse_partial_saves(model: nn.Module) -> None:
    """Make ``model.save_pretrained`` raise UnsupportedError where it would be handed parts of weights, in place.

    It does nothing else: with whole weights (``state_dict=``) it writes them as ever.
    """
    for module in model.modules():
        wrap_method(module, "save_pretrained", _WholeWeights())


class _WholeWeights(Around):
    def __call__(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        cls: Any = original_class(module)
        names = list(inspect.signature(cls.save_pretrained).parameters)[1:]
        given = {**dict(zip(names, args, strict=False)), **kwargs}.get("state_dict")
        tensors = module.parameters() if given is None else given.values()
        if any(isinstance(tensor, DTensor) for tensor in tensors):
            what = "This model is sharded" if given is None else "The state_dict holds DTensors"
            raise UnsupportedError(
                f"{what}, and {cls.__name__}.save_pretrained knows of this rank's parts only. On "
                "every rank, call shardwright.save_pretrained(model, folder): it writes the folder that plain "
                "transformers would write. Or gather the weights with torch, on every rank too, and hand them over: "
                "state = torch.distributed.checkpoint.state_dict.get_model_state_dict(model, options=StateDictOptions("
                "full_state_dict=True, cpu_offload=True)), then, on rank 0, model.save_pretrained(folder, "
                "state_dict=state)."
            )
        return forward(*args, **kwargs)
