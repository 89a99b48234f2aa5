"""Sharding with Megatron-FSDP, the name under which NVIDIA publishes nvFSDP (package ``megatron-fsdp``).

Everything after tensor parallelism: :func:`prepare` checks that it can work while nothing is changed yet, and what it
returns shards the model. From then on ``.grad`` is the truth, as in any torch model: a plain training loop with any
optimizer, ``clip_grad_norm_`` and gradient accumulation is exact, with nothing else to call.

Words used here: a *raw* parameter is what the forward computes with (this rank's part under tensor parallelism,
gathered over the data-parallel ranks when needed); the *distributed* parameter of the same name is the shard that
the optimizer sees. The package swaps the two in the modules around forward and backward.

The package itself is imported only when a model is sharded.
"""

from shardwright.distributed.apply.megatron_fsdp.availability import is_available, require
from shardwright.distributed.apply.megatron_fsdp.options import Options
from shardwright.distributed.apply.megatron_fsdp.shard import Prepared, attach_optimizer, check_config, prepare
from shardwright.distributed.apply.megatron_fsdp.tensors import copy_full_tensor_, full_tensor, held_rows, state_like

__all__ = [
    "Options",
    "Prepared",
    "attach_optimizer",
    "check_config",
    "copy_full_tensor_",
    "full_tensor",
    "held_rows",
    "is_available",
    "prepare",
    "require",
    "state_like",
]
