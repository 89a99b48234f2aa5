"""Arguments of a trainer that contradict a sharded model: refused before its first step, on every rank alike."""

from __future__ import annotations

from typing import Any

from accelerate import ParallelismConfig

from shardwright.distributed.apply.guards.fresh import Parallelized
from shardwright.errors import ConfigError, UnsupportedError


def check_arguments(args: Any, on: Parallelized) -> None:
    """Refuse what ``args`` (TrainingArguments) ask for and a model on ``on`` cannot do.

    Raises:
        ConfigError: an argument that contradicts the mesh.
        UnsupportedError: a trainer that generates (GRPO and its like) where ranks share a batch.
    """
    for name, what in _ALWAYS.items():
        if getattr(args, name, None):
            raise ConfigError(f"{name}={getattr(args, name)!r} does not work on a sharded model. {what}")
    check_degrees(getattr(args, "parallelism_config", None), on)
    shared = on.batches is None or on.batches.size() < on.mesh.size()
    if not shared:
        return
    if hasattr(args, "num_generations"):
        raise UnsupportedError(
            f"{type(args).__name__}: training on generations is not exact yet where ranks share a batch, as on "
            f"{on.mesh}. Use dp_shard and dp_replicate alone."
        )
    for name, (values, what) in _SHARED_BATCHES.items():
        value = getattr(args, name, None)
        if value in values if values else value is not None:
            raise ConfigError(f"{name}={value!r} does not work where ranks share a batch, as on {on.mesh}. {what}")


def check_degrees(asked: ParallelismConfig | None, on: Parallelized) -> None:
    """Raise ConfigError where accelerate's ``ParallelismConfig`` is not the mesh that the model is on."""
    if asked is None:
        return
    sizes = mesh_sizes(on)
    degrees = {
        "dp_replicate": asked.dp_replicate_size, "dp_shard": asked.dp_shard_size, "cp": asked.cp_size,
        "sp": asked.sp_size, "tp": asked.tp_size,
    }  # fmt: skip
    wrong = [f"{name}_size={size}" for name, size in degrees.items() if size not in (1, sizes.get(name, 1))]
    if wrong:
        raise ConfigError(
            f"parallelism_config says {', '.join(wrong)}, but the model is sharded on {on.mesh}. Leave it out: the "
            "model's mesh says it all."
        )


def mesh_sizes(on: Parallelized) -> dict[str, int]:
    """Axis -> ranks along it."""
    return {name: on.mesh.size(place) for place, name in enumerate(on.mesh.mesh_dim_names or ())}


_TWICE = "It is sharded by Shardwright already. Leave the argument out, or pass a model that is not parallelized."
_CAST = "Parameters cannot be cast in place. Compute in another dtype with ParallelConfig(precision=...)."
# Argument -> what to do instead. They are the names of transformers 5.17 to 5.23; one that is not there is not set.
_ALWAYS = {
    "fsdp": _TWICE,
    "deepspeed": _TWICE,
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
