"""Private names of torch: every use that Shardwright makes of them is here, with the versions it was seen in.

FSDP2 (torch 2.11 to 2.14) has no public way to ask what is gathered, to gather a unit and shard it again, or to read
its settings back. A *state* belongs to one ``fully_shard`` call, and a *group* holds its parameters. A group's
parameters have two forms: the shards, and the gathered ones, which are registered on the modules while the unit runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _get_default_store as default_store
from torch.distributed.distributed_c10d import _world
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, TrainingState
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import DTensor, Partial
from torch.distributed.tensor._ops._math_ops import _NormPartial
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import Placement
from torch.distributed.tensor.placement_types import _StridedShard as StridedShard
from torch.nn.modules.dropout import _DropoutNd as DropoutNd
from torch.optim.optimizer import _foreach_supported_types as _in_optimizers
from torch.utils._foreach_utils import _foreach_supported_types as _in_clipping
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_map_only, tree_unflatten

__all__ = [
    "DropoutNd",
    "FSDPParamGroup",
    "FakeTensorMode",
    "StridedShard",
    "TorchDispatchMode",
    "TrainingState",
    "add_view",
    "after_backward",
    "attention_kernels",
    "begin_backward",
    "begin_forward",
    "compute_local_shape_and_global_offset",
    "concatenated",
    "default_store",
    "drop_gathered_gradients",
    "end_backward",
    "end_forward",
    "fake_store",
    "fill_in_gradients",
    "find_root",
    "flatten",
    "flattened_names",
    "foreach_norm",
    "forget_forwards",
    "forget_unfinished_pass",
    "functional_collectives",
    "groups_of",
    "groups_of_ranks",
    "has_begun_backward",
    "has_gradient_hooks",
    "in_backward",
    "is_gathering",
    "is_traceable_wrapper_subclass",
    "is_unfinished",
    "is_unit",
    "learn_dtypes",
    "local_tensor",
    "make_wrapper",
    "packet_of",
    "part_of_norm",
    "recorded_forwards",
    "register_gathered",
    "register_shards",
    "reshards_after_forward",
    "root_of",
    "runs",
    "runs_backward",
    "runs_in_step",
    "set_runs_in_step",
    "shards_of",
    "state_of",
    "states_of",
    "storage_key",
    "take_in_groups",
    "tree_flatten",
    "tree_leaves",
    "tree_map",
    "tree_map_only",
    "tree_unflatten",
    "version_of",
    "without_dispatch_modes",
    "without_torch_function",
    "without_values",
    "written_versions",
]


# Tensors (torch 2.11 to 2.14)

without_torch_function = torch._C.DisableTorchFunctionSubclass
without_dispatch_modes = torch._C._DisableTorchDispatch
make_wrapper: Callable[..., Any] = Tensor._make_wrapper_subclass
functional_collectives = torch.ops._c10d_functional
foreach_norm = torch._foreach_norm


def version_of(x: Tensor) -> int:
    """A number that grows whenever ``x`` is written to; writes through ``.data`` are not seen."""
    return x._version


def without_values(x: Tensor) -> bool:
    """Whether ``x`` has a shape and no numbers: on meta, or in a trace."""
    return x.is_meta or isinstance(x, FakeTensor)


def local_tensor(x: DTensor) -> Tensor:
    """The part of ``x`` that this rank holds: the tensor itself, where ``to_local()`` gives a view with a gradient."""
    return x._local_tensor


def attention_kernels() -> tuple[Any, ...]:
    """The operations that torch's scaled dot-product attention becomes."""
    aten = torch.ops.aten
    return (
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
    )


def packet_of(operation: Any) -> Any:
    """What all overloads of an operation belong to, such as ``torch.ops.aten.mm``."""
    return operation._overloadpacket


def storage_key(x: Tensor) -> int:
    """The same for tensors that share memory, fake ones too."""
    return x.untyped_storage()._cdata


def fake_store() -> Any:
    """The store of a process group of ranks that exchange nothing (backend ``"fake"``)."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    return FakeStore()


# Meshes (torch 2.11 to 2.14: there is no public way yet)


def groups_of_ranks() -> int:
    """How many process groups this process has made and not destroyed, of a mesh or by themselves."""
    return len(_world.pg_map)


def flatten(mesh: DeviceMesh, name: str) -> None:
    """Make the axes of ``mesh`` known to its root mesh as one axis, ``name``."""
    mesh._flatten(mesh_dim_name=name)


def flattened_names(mesh: DeviceMesh) -> list[str]:
    """The names of all flattened axes of the root mesh."""
    return list(mesh._get_root_mesh()._flatten_mapping)


# Autograd


def has_gradient_hooks(param: Tensor) -> bool:
    """Whether ``param`` has hooks on its gradient, of either kind (torch 2.11 to 2.14)."""
    return bool(param._backward_hooks or param._post_accumulate_grad_hooks)


def in_backward() -> bool:
    """Whether this thread runs a backward (torch 2.11 to 2.14)."""
    return torch._C._current_graph_task_id() != -1


def after_backward(function: Callable[[], None]) -> None:
    """Call ``function`` when the backward that runs has ended, after those that asked before (torch 2.11 to 2.14)."""
    torch.autograd.Variable._execution_engine.queue_callback(function)


# Optimizers


def take_in_groups(cls: type[torch.Tensor]) -> None:
    """Let optimizers and clipping take tensors of this class together, as they do DTensors (torch 2.11 to 2.14)."""
    for known in (_in_optimizers, _in_clipping):
        if cls not in known:
            known.append(cls)


# Meshes


def add_view(mesh: DeviceMesh, flattened: str, sizes: tuple[int, ...], names: tuple[str, ...]) -> None:
    """Fold a flattened axis of ``mesh`` anew; the mesh can be asked for each of ``names`` (torch 2.11 to 2.13).

    Args:
        sizes: of the new axes, from the outermost; their product is the size of ``flattened``.
    """
    root = mesh._get_root_mesh()
    view = root._flatten_mapping[flattened]._unflatten(0, sizes, names)
    root._flatten_mapping.update({name: view[name] for name in names})


def concatenated(*meshes: DeviceMesh) -> DeviceMesh:
    """The mesh whose axes are those of ``meshes``, which come from one root (torch 2.11 to 2.13)."""
    return DeviceMesh._concatenate(list(meshes))


# DTensor


def part_of_norm(order: float) -> Placement:
    """The placement of a norm of which every rank holds that of its shard (torch 2.11 to 2.13)."""
    if math.isinf(order):  # as DTensor's own: one kind cannot be made into the other
        return Partial("max" if order > 0 else "min")
    return _NormPartial(order)


# FSDP2


def states_of(model: nn.Module) -> list[Any]:
    """The FSDP2 states in ``model``, outermost first, each once (one state may own several modules)."""
    found = (module._get_fsdp_state() for module in model.modules() if isinstance(module, FSDPModule))
    return list(dict.fromkeys(found))


def runs(model: nn.Module) -> bool:
    """Whether a forward of ``model``, or around it, or a backward runs, so that parameters may be gathered ones."""
    if in_backward():
        return True
    return isinstance(model, FSDPModule) and root_of(model._get_fsdp_state()) is not None


def groups_of(state: Any) -> list[Any]:
    """Its parameter groups: one, or none where its modules have no parameters of their own."""
    if torch.__version__ >= "2.12":  # compares versions, not texts
        return list(state._fsdp_param_groups)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]


def find_root(state: Any) -> None:
    """Let the first forward's work be done now, in which FSDP2 learns which of its units is the outermost."""
    if state._is_root is None:
        state._lazy_init()


def root_of(state: Any) -> Any:
    """The state whose forward is the outermost of those that run; None where none does."""
    return state._state_ctx.iter_forward_root


def is_gathering(group: Any) -> bool:
    """Whether ``group`` is about to be gathered: nobody has waited for it yet."""
    return group._all_gather_result is not None


def reshards_after_forward(group: Any) -> bool:
    """Whether ``group`` gives its gathered parameters back between forward and backward."""
    return group._reshard_after_forward


def state_of(module: nn.Module) -> Any:
    """The state of an FSDP2 unit."""
    return module._get_fsdp_state()  # type: ignore[operator]


def is_unit(module: nn.Module) -> bool:
    """Whether ``module`` is an FSDP2 unit, by itself and not with others."""
    return isinstance(module, FSDPModule) and len(state_of(module)._modules) == 1


def begin_forward(state: Any, module: nn.Module, value: torch.Tensor) -> torch.Tensor:
    """Do what FSDP2 does before a forward with ``value``; returns what the forward would be called with."""
    (value,), _ = state._pre_forward(module, (value,), {})
    return value


def end_forward(state: Any, module: nn.Module, value: torch.Tensor) -> torch.Tensor:
    """Do what FSDP2 does after a forward that returned ``value``; returns what its caller would get."""
    result: torch.Tensor = state._post_forward(module, (value,), value)
    return result


def leave_forwards_alone(state: Any) -> None:
    """Let the modules of a unit run without FSDP2 noticing; :func:`begin_forward` and :func:`end_forward` tell it."""
    state._pre_forward_hook_handle.remove()
    state._post_forward_hook_handle.remove()


def has_begun_backward(state: Any) -> bool:
    """Whether backward has come to the unit of ``state``, or has left it."""
    return any(
        group._training_state in (TrainingState.PRE_BACKWARD, TrainingState.POST_BACKWARD) for group in groups_of(state)
    )


def begin_backward(state: Any) -> None:
    """Do what FSDP2 does when backward comes to a unit."""
    state._pre_backward(None)


def end_backward(state: Any) -> None:
    """Do what FSDP2 does when backward leaves a unit, where it has not."""
    for group in reversed(groups_of(state)):
        if group._training_state is not TrainingState.POST_BACKWARD:
            group.post_backward()


def runs_backward(group: Any) -> bool:
    """Whether backward has come to ``group`` and not yet left it."""
    return group._training_state is TrainingState.PRE_BACKWARD


def fill_in_gradients(group: Any) -> list[nn.Parameter]:
    """Give zeros to the trained parameters of ``group`` that have got no gradient; returns their shards.

    These zeros are negative, and no other gradient begins a rank's shard with a negative zero: a sum of zeros is
    negative only where all of them are (IEEE 754), so the reduced gradient tells whether any rank had one.
    """
    filled, begins = [], []
    for param in group.fsdp_params:
        if not (param.sharded_param.requires_grad and hasattr(param, "_unsharded_param")):
            continue
        grad = param.unsharded_accumulated_grad
        grad = param.unsharded_param.grad if grad is None else grad
        if grad is None:
            param.unsharded_param.grad = torch.full_like(param.unsharded_param, -0.0)
            filled.append(param.sharded_param)
        else:
            begins.append(_begins_of_shards(param, grad))
    if begins:
        torch._foreach_add_(begins, 0.0)  # -0.0 + 0.0 is 0.0
    return filled


def _begins_of_shards(param: Any, grad: Tensor) -> Tensor:
    """The first element of every rank's shard, a view of ``grad``."""
    local = local_tensor(grad) if isinstance(grad, DTensor) else grad
    dim, mesh = param.fsdp_placement.dim, param.mesh_info
    ranks = mesh.shard_mesh_size if isinstance(mesh, FSDPMeshInfo) else 1
    step = max(-(-local.shape[dim] // ranks), 1)
    return local.detach()[tuple(slice(0, None, step) if n == dim else slice(0, 1) for n in range(local.ndim))]


def runs_in_step(module: nn.Module) -> bool:
    """Whether FSDP2 says that ``module`` must run alike on all ranks.

    transformers' ``generate()`` then agrees with the world, token by token, and its models run layers that LayerDrop
    drops.
    """
    return vars(module).get("_is_fsdp_managed_module", False)


def set_runs_in_step(module: nn.Module, value: bool) -> None:
    """Say so, or the opposite."""
    vars(module)["_is_fsdp_managed_module"] = value


def shards_of(group: Any) -> list[nn.Parameter]:
    """The parameters of ``group``, in the form that an optimizer sees."""
    return [param.sharded_param for param in group.fsdp_params]


def learn_dtypes(group: Any) -> None:
    """Let a group that has been frozen so far learn in which dtype its gradients are reduced, if it is trained now."""
    if group._orig_dtype is None and any(param.sharded_param.requires_grad for param in group.fsdp_params):
        group._init_mp_dtypes()


def register_shards(group: Any) -> None:
    """Make the shards what modules show, and leave what is gathered where it is."""
    for param in group.fsdp_params:
        param._setattr_on_modules(param.sharded_param)


def register_gathered(group: Any) -> None:
    """Make what is gathered what modules show, as trainable as the shards are now."""
    for param in group.fsdp_params:
        param._unsharded_param.requires_grad_(param.sharded_param.requires_grad)
        param._setattr_on_modules(param._unsharded_param)


def written_versions(group: Any) -> list[tuple[int, int]]:
    """Numbers that grow when the shards are written to; writes through ``.data`` are not seen."""
    shards = (param.sharded_param for param in group.fsdp_params)
    return [(version_of(shard), version_of(local_tensor(shard))) for shard in shards]


def recorded_forwards(groups: list[Any]) -> list[tuple[int, int]]:
    """For each group, how many forwards FSDP2 remembers: of all groups, and of this one. It prefetches along them."""
    return [(len(group.comm_ctx.post_forward_order), len(group._post_forward_indices)) for group in groups]


def forget_forwards(groups: list[Any], recorded: list[tuple[int, int]]) -> None:
    """Go back to what ``recorded_forwards(groups)`` was."""
    for group, (everyone, own) in zip(groups, recorded, strict=True):
        del group.comm_ctx.post_forward_order[everyone:]
        del group._post_forward_indices[own:]


def drop_gathered_gradients(group: Any) -> None:
    """Forget the gradients that have not been reduced to the shards."""
    for param in group.fsdp_params:
        param.unsharded_accumulated_grad = None
        if hasattr(param, "_unsharded_param"):
            param._unsharded_param.grad = None


def is_unfinished(state: Any) -> bool:
    """Whether a backward under the root ``state`` has begun and not ended."""
    return state._state_ctx.post_backward_final_callback_queued


def forget_unfinished_pass(states: list[Any]) -> None:
    """Clear what a forward or backward cut short by an error leaves behind; accumulated gradients stay."""
    for state in states:
        state._training_state = TrainingState.IDLE
        state._modules_to_run_forward.clear()
        state._state_ctx.iter_forward_root = None
        state._state_ctx.post_backward_final_callback_queued = False
        for group in groups_of(state):
            group._training_state = TrainingState.IDLE
