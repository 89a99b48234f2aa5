"""Arguments of a trainer that contradict a sharded model: refused before its first step, on every rank alike."""

from __future__ import annotations

from typing import Any

from shardwright.distributed.apply.guards.fresh import Parallelized
from shardwright.errors import ConfigError


def check_arguments(args: Any, on: Parallelized) -> None:
    """Raise ConfigError where ``args`` (TrainingArguments) ask for what a model on ``on`` cannot do."""
    for name, what in _ALWAYS.items():
        if getattr(args, name, None):
            raise ConfigError(f"{name}={getattr(args, name)!r} does not work on a sharded model. {what}")
    shared = on.batches is None or on.batches.size() < on.mesh.size()
    if not shared:
        return
    for name, (values, what) in _SHARED_BATCHES.items():
        value = getattr(args, name, None)
        if value in values if values else value is not None:
            raise ConfigError(f"{name}={value!r} does not work where ranks share a batch, as on {on.mesh}. {what}")


_CAST = "Parameters cannot be cast in place. Compute in another dtype with ParallelConfig(precision=...)."
# Argument -> what to do instead. They are the names of transformers 5.17 to 5.23; one that is not there is not set.
_ALWAYS = {
    "use_liger_kernel": (
        "It puts kernels into a model that is sharded already. Apply Liger's kernels to the model first, parallelize "
        "it last; tensor parallelism refuses them."
    ),
    "auto_find_batch_size": (
        "It starts anew on the rank that is out of memory, while the others wait for it. Set "
        "per_device_train_batch_size; `shardwright estimate` predicts the memory."
    ),
    "fp16_full_eval": _CAST,
    "bf16_full_eval": _CAST,
}
# Argument -> the values that are refused (none: any), and what to do instead.
_SHARED_BATCHES: dict[str, tuple[tuple[Any, ...], str]] = {
    "train_sampling_strategy": (
        ("batch_rebalance",),
        "It deals batches by the global rank. Use 'group_by_length' or 'random'.",
    ),
    "neftune_noise_alpha": ((), "Every rank would add noise of its own to the same batch. Use dp_shard alone."),
}
