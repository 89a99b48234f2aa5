"""The bar for long sequences: each rank has a chunk of them, attention gathers keys and values, FSDP2 sums gradients.

What an expert writes for a causal model, after the keys and values that torch's own context parallelism and Llama 3's
training gather (https://arxiv.org/abs/2407.21783, 3.3.2): the chunks before a rank's own are all that it attends to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.nn.functional import all_gather
from torch.nn import functional
from transformers import AttentionInterface


def context_parallel(model: Any, mesh: DeviceMesh) -> Callable[[Mapping[str, Any]], Any]:
    """Give the model attention over all chunks; what computes forward and backward of a whole batch is returned."""
    rank, ranks, group = mesh.get_local_rank(), mesh.size(), mesh.get_group()

    def attention(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: float, **_: Any
    ) -> tuple[Any, None]:
        chunk = query.shape[2]
        end = (rank + 1) * chunk
        both = torch.cat(all_gather(torch.stack((key, value)), group=group)[: rank + 1], 3)
        mask = torch.ones(chunk, end, dtype=torch.bool).tril(rank * chunk)
        out = functional.scaled_dot_product_attention(
            query, both[0], both[1], attn_mask=mask, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("gathered", attention)
    model.set_attn_implementation("gathered")

    def backward(batch: Mapping[str, Any]) -> Any:
        targets = functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
        chunk = targets.shape[1] // ranks
        mine = slice(rank * chunk, (rank + 1) * chunk)
        positions = torch.arange(rank * chunk, (rank + 1) * chunk).unsqueeze(0)
        logits = model(input_ids=batch["input_ids"][:, mine], position_ids=positions, use_cache=False).logits
        losses = functional.cross_entropy(logits.flatten(0, 1), targets[:, mine].flatten(), reduction="sum")
        loss = losses / (targets != -100).sum()
        (loss * ranks).backward()  # FSDP2 averages over the ranks
        whole = loss.detach()
        dist.all_reduce(whole, group=group)
        return whole

    return backward
