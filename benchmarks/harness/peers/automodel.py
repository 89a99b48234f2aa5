"""NeMo Automodel: its FSDP2 parallelizer, which has the tensor-parallel plans too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist
from nemo_automodel.components.distributed.config import FSDP2Config
from nemo_automodel.components.distributed.mesh import ParallelismSizes
from nemo_automodel.components.distributed.mesh_utils import _create_device_meshes
from nemo_automodel.components.distributed.parallelizer import fsdp2_strategy_parallelize
from nemo_automodel.components.loss.masked_ce import MaskedCrossEntropy
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn import functional
from transformers import AutoModelForCausalLM

from harness.layouts import Layout, Sharded


def build(folder: str, layout: Layout) -> Sharded:
    sizes = ParallelismSizes(dp_size=layout.dp, tp_size=layout.tp)
    mesh, _ = _create_device_meshes(FSDP2Config(), sizes, world_size=dist.get_world_size())
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").train()
    model = fsdp2_strategy_parallelize(
        model,
        mesh,
        mp_policy=MixedPrecisionPolicy(),  # float32, as everyone here
        sequence_parallel=layout.sequence_parallel,
        activation_checkpointing=layout.activation_checkpointing,
    )
    return Sharded(model, backward_of(model))


def backward_of(model: Any) -> Callable[[Mapping[str, Any]], Any]:
    """Forward and backward as its recipes do it: their own loss, since some plans leave the logits sharded."""
    loss_function = MaskedCrossEntropy(fp32_upcast=False)

    def backward(batch: Mapping[str, Any]) -> Any:
        targets = functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:].contiguous()
        count = int((targets != -100).sum())
        loss = loss_function(model(input_ids=batch["input_ids"]).logits, targets, num_label_tokens=count)
        loss.backward()
        return loss.detach()

    return backward
