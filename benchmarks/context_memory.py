"""What does a rank keep between forward and backward of one long sequence, with 1, 2, 4 and 8 context-parallel ranks?

Fake tensors of the shape of Llama 3.1 8B in bfloat16, on the last rank of a group that exchanges nothing, which sees
all keys. Counted are the tensors that autograd saves, each storage once, without parameters, for one and for two
blocks; their difference is what a block keeps. Masks that a CPU makes for causal attention are left out, for GPUs make
none.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from itertools import product

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM, LlamaConfig, masking_utils

from shardwright import ParallelConfig, make_mesh
from shardwright._transformers import one_document_in_each_row
from shardwright.distributed.apply.activation_checkpointing import apply_activation_checkpointing
from shardwright.distributed.apply.context_parallel import apply_context_parallel
from shardwright.distributed.models.attention import attention_kernels, register_context_attention
from shardwright.distributed.planning.decide import decide
from shardwright.distributed.replay.reading import ModelReading

BLOCKS = 32
LLAMA = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 128256, "max_position_embeddings": 1 << 20,
}  # fmt: skip
LENGTHS = (32768, 131072, 524288, 1 << 20)
RANKS = (1, 2, 4, 8)


def kept(blocks: int, cp: int, length: int, checkpointing: str) -> tuple[int, int]:
    """Bytes that are kept, and those of them outside of the blocks' tensors: logits and what the loss saves of them."""
    dist.init_process_group("fake", store=FakeStore(), rank=cp - 1, world_size=cp)
    try:
        config = ParallelConfig(cp=cp, dp_shard=1, activation_checkpointing=checkpointing)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA, num_hidden_layers=blocks)).bfloat16()
        decided = decide(ModelReading(model), config, tp=1, cp=cp, fsdp2=False)
        if decided.context is not None:
            register_context_attention()
            kernels = attention_kernels(model, {name: use.kernel for name, use in decided.context.attention.items()})
            apply_context_parallel(model, make_mesh(config, "cpu")["cp"], None, decided.context, kernels)
        apply_activation_checkpointing(model, decided.recomputed, selective=False, offload=False)
        with FakeTensorMode(allow_non_fake_inputs=True):
            model.to_empty(device="cpu")
            return _saved(model, torch.zeros(1, length, dtype=torch.long), length // cp)
    finally:
        dist.destroy_process_group()


def _saved(model: torch.nn.Module, ids: Tensor, rows: int) -> tuple[int, int]:
    known = {param.untyped_storage()._cdata for param in model.parameters()}
    found: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        part = (x.to_local() if isinstance(x, DTensor) else x).detach()
        is_mask = part.shape[-2:] == (rows, ids.shape[1])
        if part.untyped_storage()._cdata not in known and not is_mask:
            found.setdefault(part.untyped_storage()._cdata, part)
        return x

    with saved_tensors_hooks(pack, lambda x: x), one_document_in_each_row(masking_utils):
        model(input_ids=ids, labels=ids, use_cache=False)
    vocabulary = [x for x in found.values() if LLAMA["vocab_size"] in x.shape]
    return _bytes(found.values()), _bytes(vocabulary)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(x.untyped_storage().nbytes() for x in tensors)


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    print("| positions | blocks | " + " | ".join(f"cp {cp}" for cp in RANKS) + " |")
    print("| --- | --- |" + " --- |" * len(RANKS))
    logits = {}
    for length, checkpointing in product(LENGTHS, ("none", "full")):
        cells = []
        for cp in RANKS:
            (one, outside), (two, _) = (kept(blocks, cp, length, checkpointing) for blocks in (1, 2))
            logits[length, cp] = outside
            cells.append(f"{(one + (BLOCKS - 1) * (two - one) - outside) / 2**30:.1f}")
        print(f"| {length} | {'kept' if checkpointing == 'none' else 'recomputed'} | {' | '.join(cells)} |")
    for length in LENGTHS:
        cells = [f"{logits[length, cp] / 2**30:.1f}" for cp in RANKS]
        print(f"| {length} | logits and loss | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
