"""The public module's names, parameters and defaults are those of the module it stands in for."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from shardwright.distributed import parallelizer

REQUIRED = inspect.Parameter.empty
AXES_OF_FSDP2 = {"dp_replicate_mesh_name": "dp_replicate", "dp_shard_cp_mesh_name": "dp_shard_cp", "tp_mesh_name": "tp"}
SIGNATURES: dict[str, dict[str, Any]] = {
    "apply_fsdp2_sharding_recursively": {
        "module": REQUIRED, "mesh": REQUIRED, "mp_policy": REQUIRED, "offload_policy": None,
    },
    "get_hf_tp_shard_plan": {"model": REQUIRED},
    "import_class_from_path": {"name": REQUIRED},
    "import_classes_from_paths": {"class_paths": REQUIRED},
    "translate_to_torch_parallel_style": {"style": REQUIRED},
    "validate_tp_mesh": {"model": REQUIRED, "tp_mesh": REQUIRED},
    "get_lm_ac_layers": {"model": REQUIRED},
    "_get_parallel_plan": {"model": REQUIRED, "sequence_parallel": False, "tp_shard_plan": None},
    "fsdp2_strategy_parallelize": {
        "model": REQUIRED, "device_mesh": REQUIRED, "mp_policy": None, "offload_policy": None,
        "sequence_parallel": False, "activation_checkpointing": False, "tp_shard_plan": None, **AXES_OF_FSDP2,
    },
    "nvfsdp_strategy_parallelize": {
        "model": REQUIRED, "device_mesh": REQUIRED, "optimizer": None, "nvfsdp_unit_modules": None,
        "tp_shard_plan": None, "data_parallel_sharding_strategy": "optim_grads_params",
        "init_nvfsdp_with_meta_device": False, "grad_reduce_in_fp32": False, "preserve_fp32_weights": False,
        "overlap_grad_reduce": True, "overlap_param_gather": True, "check_for_nan_in_grad": True,
        "average_in_collective": False, "disable_bucketing": False, "calculate_per_token_loss": False,
        "keep_fp8_transpose_cache_when_using_custom_fsdp": False, "nccl_ub": False, "fsdp_double_buffer": False,
        "dp_mesh_name": "dp", "cp_mesh_name": "cp", "tp_mesh_name": "tp",
    },
    "unshard_fsdp2_model": {"model": REQUIRED},
}  # fmt: skip


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name: str) -> None:
    parameters = inspect.signature(getattr(parallelizer, name)).parameters
    assert list(parameters) == list(SIGNATURES[name])
    for parameter, default in SIGNATURES[name].items():
        found = parameters[parameter]
        assert found.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD, parameter
        assert found.default is default or (found.default == default and type(found.default) is type(default)), found


def test_have_nvfsdp_is_a_plain_bool() -> None:
    assert type(parallelizer.HAVE_NVFSDP) is bool


def test_every_name_is_documented_and_exported() -> None:
    for name in SIGNATURES:
        assert inspect.getdoc(getattr(parallelizer, name)), name
        assert name.startswith("_") or name in parallelizer.__all__, name
