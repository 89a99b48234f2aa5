"""Megatron-FSDP made exact: subclasses of its two main classes. The one file that knows the package's internals.

What is different from the package (0.5 and 0.6; its behaviour was found by experiment):

* With tensor parallelism it takes a parameter's *global* shape for that of its rank-local buffer, and puts replicated
  parameters on another mesh than sharded ones (:class:`_Buffer`).
* A gradient that arrives with another placement than its parameter's is copied as if it had the same one; a hook lays
  it out as the parameter is.
* ``no_shard`` and ``optim`` reduce into the buffer that they accumulate in, so a second ``backward()`` reduces the
  first again; and gradients cleared by anything but the package's own methods come back. Here ``.grad`` is what
  counts: the buffers are set from it when a backward starts (:meth:`_Buffer.load_gradients`).
* Where a rank holds no part of a parameter, ``.grad`` is None there; collectives over gradients (clipping) then differ
  between ranks. Here it is an empty shard.
* A parameter that takes no part gets a gradient of zeros, with which an optimizer still decays it; here it gets None,
  unless some rank's backward has come to it.
* The start of a backward is missed for outputs that are neither tensors nor tuples (a ``ModelOutput``); the model's
  own hook finds them in any structure.
* ``overlap_grad_reduce=False`` reduces twice with ``optim``. Here it reduces once, after backward.
* Gathered weights stay in use, and gathers that run ahead write old weights back, when the distributed parameters
  change after a forward without backward, or, with ``overlap_param_gather=False``, at all. Here nothing gathered or in
  flight is used by a later forward (:meth:`ShardedModel._forget_gathered`), and between a forward and its backward the
  model shows the distributed parameters.
* Double buffers are found by a name that is the same in every model of the process, so that two models overwrite each
  other's weights; here it is the model's own.
* The NaN check raises on one rank while the others wait for it; here all ranks raise, with the same message.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import megatron_fsdp.megatron_fsdp as package
import torch
import torch.distributed as dist
from megatron_fsdp import MegatronFSDP
from megatron_fsdp.param_and_grad_buffer import FixedPoolAllocator, ParamAndGradBuffer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shardwright._torch import after_backward, in_backward, tree_leaves, version_of
from shardwright.distributed.apply.megatron_fsdp.tensors import (
    Layout,
    describe_for_dcp,
    like,
    local_part,
    locate,
)
from shardwright.errors import ConfigError, RunError


class _Buffer(ParamAndGradBuffer):
    """The package's parameters and gradients, with distributed tensors of the right shapes."""

    layout: Layout  # set on a subclass before the package makes an instance
    exact: dict[str, Tensor]  # values of higher precision than the model's weights, by name

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, FixedPoolAllocator):
            value.name = f"{value.name} of {id(self)}"  # before it hands out the first
        super().__setattr__(name, value)

    def _init_distributed_params(self) -> None:
        self.dist_main_weight: dict[str, DTensor] = {}
        self.dist_main_grad: dict[str, DTensor] = {}  # stays empty: see update_main_grads
        for group in self.parameter_groups:
            weights = group.main_weight_buffer or group.model_weight_buffer
            for item, raw in enumerate(group.params):
                name = self.param_to_name[raw]
                if group.main_weight_buffer and name in self.exact:
                    weights.set_item(item, self.exact.pop(name))
                flat = weights.get_item(item, only_shard=self.layout.sharded) if weights else local_part(raw.detach())
                self.dist_main_weight[name] = self.layout.distribute(flat, raw)

    def _init_optimizer_named_parameters(self) -> list[tuple[str, Any]]:
        named = super()._init_optimizer_named_parameters()
        for _, param in named:
            group, item = self._place(param)
            buffer = group.model_weight_buffer if self.layout.sharded else None
            whole = (0, local_part(param.orig_param).numel())
            locate(param, buffer._get_item_slice_in_shard(item) if buffer else whole)
            if self.layout.sharded:
                describe_for_dcp(param)
        return named

    def _place(self, param: Any) -> tuple[Any, int]:
        """The group of a distributed parameter, and its number in it."""
        group = self.parameter_groups[self.param_to_param_group[param.orig_param]]
        return group, next(i for i, raw in enumerate(group.params) if raw is param.orig_param)

    def _reset_parameters(self, old: list[nn.Parameter], new: list[nn.Parameter]) -> None:
        # Coming off the meta device, a DTensor stays the same object, which the package would then forget.
        other = [(before, after) for before, after in zip(old, new, strict=True) if before is not after]
        super()._reset_parameters([before for before, _ in other], [after for _, after in other])

    @property
    def trained(self) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
        """Name, distributed parameter and reduced gradient (flat, a view of the buffer) of all that train."""
        for name, param in self.optimizer_named_parameters:
            group = self.parameter_groups[self.param_to_param_group[param.orig_param]]
            buffer = group.main_grad_buffer
            if buffer is not None:
                yield name, param, buffer.get_item(buffer.param_idx[param.orig_param], only_shard=self.layout.sharded)

    def update_main_grads(self) -> None:
        """Put the reduced gradients where an optimizer looks for them."""
        for _, param, grad in self.trained:
            given = like(param, grad.to(param.dtype))
            given.version = version_of(local_part(given))  # type: ignore[attr-defined]
            param.grad = given

    @torch.no_grad()
    def load_gradients(self) -> None:
        """Set the gradient buffers such that reducing them again adds nothing to what ``.grad`` holds now.

        Called before the gradients of a backward are added.
        """
        for _, param, grad in self.trained:
            if param.grad is None:
                grad.zero_()
                continue
            own = local_part(param.grad)
            same = own.data_ptr() == grad.data_ptr() and own.dtype == grad.dtype
            rounded = vars(param.grad).get("version") == own._version  # what the buffer has in a higher precision
            if not (same or rounded):
                grad.copy_(own.flatten())
        for group in self.parameter_groups:
            if group.main_grad_buffer is not None and not group.main_grad_buffer.is_data_distributed:
                self._undo_reduction(group.main_grad_buffer)

    def _undo_reduction(self, buffer: Any) -> None:
        """Make an unsharded buffer of reduced gradients one whose reduction gives the same again."""
        ranks = buffer.dp_world_size
        averaged = self.ddp_config.average_in_collective or buffer.gradient_scaling_factor is not None
        if not self.layout.sharded:
            if not averaged:
                buffer.data.div_(ranks)
            return
        own = buffer.shard_bucket_index
        buffer.data[: own.local_data_index].zero_()
        buffer.data[own.local_data_index + own.size :].zero_()
        if averaged:
            buffer.get_shard_from_local_buffer().mul_(ranks)


class ShardedModel(MegatronFSDP):
    """A Megatron-FSDP model that is exact in any training loop, whether it or the model inside is called.

    Args:
        module: the model; tensor-parallel parameters are DTensors on the ``tp`` mesh.
        layout: mesh of the distributed parameters.
        check_gradients: raise when a gradient is not finite.
        exact: float32 values of parameters that ``module`` holds rounded.
        others: as :class:`MegatronFSDP` takes them.
    """

    def __init__(
        self, module: nn.Module, *, layout: Layout, check_gradients: bool, exact: dict[str, Tensor], **others: Any
    ) -> None:
        config = others["ddp_config"]
        # The package changes both in its config for strategies that need them.
        self.__dict__["_overlap_param_gather"] = config.overlap_param_gather
        self.__dict__["_layout"] = layout
        self.__dict__["_exact"] = exact
        super().__init__(module, **others)
        self._overlap_grad_reduce = self.ddp_config.overlap_grad_reduce
        self._check_gradients = check_gradients
        self._in_backward = False
        self._reached: set[str] = set()  # by the backward that runs, or an earlier one since gradients were cleared
        # Tensor parallelism reads whole parameters outside of units when the model begins, not when their module does.
        self._read_by_root = [
            raw
            for group in self.param_and_grad_buffer.parameter_groups
            for raw in group.params
            if group.fsdp_unit_id is None and isinstance(raw, DTensor) and raw.placements[0].is_replicate()
        ]
        for name, param in self.param_and_grad_buffer.optimizer_named_parameters:
            param._megatron_fsdp_model = self.raw_param[name]._megatron_fsdp_model = self
        for raw in self.raw_param.values():
            if isinstance(raw, DTensor) and raw.requires_grad:
                raw.register_hook(_laid_out_as(raw))
        for name, param, _ in self.param_and_grad_buffer.trained:
            param.orig_param.register_post_accumulate_grad_hook(partial(self._reach, name))
        module.register_forward_pre_hook(self._before_forward, prepend=True)
        module.register_forward_hook(self._after_forward)
        module.register_state_dict_post_hook(partial(ShardedModel._describe_state_dict, self))

    @staticmethod
    def of(model: nn.Module) -> ShardedModel:
        """The sharded model that ``model``, which may be the model inside, belongs to.

        Raises:
            ConfigError: it is not sharded with Megatron-FSDP.
        """
        found = next((vars(param).get("_megatron_fsdp_model") for param in model.parameters()), None)
        if not isinstance(found, ShardedModel):
            raise ConfigError(f"This {type(model).__name__} is not sharded with Megatron-FSDP.")
        return found

    @property
    def distributed(self) -> dict[str, nn.Parameter]:
        """The distributed parameters by their names in the model inside."""
        return dict(self.param_and_grad_buffer.optimizer_named_parameters)

    def _init_fsdp_param_and_grad_buffer(self) -> None:
        buffer = type("Buffer", (_Buffer,), {"layout": self._layout, "exact": self._exact})
        package.ParamAndGradBuffer = buffer  # the name by which the package makes its buffer, for this call only
        try:
            super()._init_fsdp_param_and_grad_buffer()
        finally:
            package.ParamAndGradBuffer = ParamAndGradBuffer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def all_gather_and_wait_parameters_ready(self, params: Any, prefetch: bool = True, **others: Any) -> None:
        # Tensor parallelism shows whole parameters as plain tensors while the model runs; they are gathered already.
        raw = [param for param in params if param in self.param_and_grad_buffer.param_to_param_group]
        super().all_gather_and_wait_parameters_ready(raw, prefetch and self._overlap_param_gather, **others)

    def set_model_auto_sync(self, sync_model: bool = True) -> None:
        self.model_auto_sync = sync_model  # without a warning of sums that would come twice: see load_gradients

    def synchronize_gradient_reduce(self) -> None:
        self.grad_reduce_pipeline.wait_for_previous_grad_reduce(0)
        self.grad_reduce_pipeline.reset()

    def _replace_param_with_distributed_if_needed(self) -> None:
        if not self.is_param_fsdp_distributed:
            self._forget_gathered()
        super()._replace_param_with_distributed_if_needed()

    def _forget_gathered(self) -> None:
        """Gathers that run ahead would write old weights over new ones, and gathered weights would be old ones."""
        pipeline = self.all_gather_pipeline
        for bucket, backward in list(pipeline.param_gather_event_map):
            pipeline.wait_bucket_ready(bucket, backward)
        pipeline.reset()

    def _before_forward(self, *_: Any) -> None:
        if not in_backward():  # else: recomputed within a backward
            # Still set after a backward that raised; the next one must not take itself for that one.
            self._in_backward = self._root_pre_backward_hook_issued = False
        if self.is_param_fsdp_distributed:
            # An optimizer, or whoever loads weights, may have written into the distributed parameters.
            self._forget_gathered()
            self.install_optimized_model_weights()
            self._replace_param_with_raw_if_needed()
        self.all_gather_and_wait_parameters_ready(self._read_by_root, prefetch=False)

    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        tensors = [x for x in tree_leaves(output) if isinstance(x, Tensor) and x.requires_grad]
        if torch.is_grad_enabled() and tensors:
            torch.autograd.graph.register_multi_grad_hook(tensors, self._before_backward, mode="any")
            if not self._in_backward:
                super()._replace_param_with_distributed_if_needed()  # what is gathered waits for backward
        elif not self._in_backward:
            self._replace_param_with_distributed_if_needed()

    def _before_backward(self, *_: Any) -> None:
        if self._in_backward:
            return
        self._in_backward = True
        self._replace_param_with_raw_if_needed()
        self._reached = {name for name, param, _ in self.param_and_grad_buffer.trained if param.grad is not None}
        self.param_and_grad_buffer.load_gradients()
        self.model_auto_sync = self._overlap_grad_reduce
        self.pre_backward.func(self.module)  # queues the package's own end of backward, ahead of ours
        after_backward(self._after_backward)

    def _after_backward(self) -> None:
        self._in_backward = False
        if not self.model_auto_sync:
            raw = [param.orig_param for _, param, _ in self.param_and_grad_buffer.trained]
            self.grad_reduce_pipeline.reduce_gradients(raw)
            self.finish_grad_sync()
            self.model_auto_sync = True
        self._drop_unreached()
        if self._check_gradients:
            self._require_finite_gradients()

    def _reach(self, name: str, _: Tensor) -> None:
        self._reached.add(name)

    @torch.no_grad()
    def _drop_unreached(self) -> None:
        """Take back gradients of what is frozen, and those, all zero, of what no backward of any rank has come to."""
        trained = [(name, param) for name, param, _ in self.param_and_grad_buffer.trained]
        reached = torch.tensor([name in self._reached for name, _ in trained], dtype=torch.int32, device=self.device)
        for (_, param), flag in zip(trained, self._anywhere(reached), strict=True):
            if not flag or not param.requires_grad:
                param.grad = None

    def _anywhere(self, flags: Tensor) -> list[int]:
        """Which of ``flags`` (int32, 1-D) are set on some rank."""
        for axis in range(self._layout.mesh.ndim):
            dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._layout.mesh.get_group(axis))
        return flags.tolist()

    @torch.no_grad()
    def _require_finite_gradients(self) -> None:
        names, grads = [], []
        for name, _, grad in self.param_and_grad_buffer.trained:
            names.append(name)
            grads.append(grad)
        if not grads:
            return
        bad = torch.stack([~grad.isfinite().all() for grad in grads]).int()
        found = [name for name, flag in zip(names, self._anywhere(bad), strict=True) if flag]
        if found:
            shown = ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
            raise RunError(
                f"The gradients of {len(found)} of {len(names)} parameters hold NaN or infinity: {shown}. Look at the "
                "loss and the batch of this step; check_for_nan_in_grad=False skips this check."
            )

    def _describe_state_dict(self, module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        distributed = {id(param) for param in self.distributed.values()}
        for name, param in module.named_parameters(remove_duplicate=False):
            found = state.get(prefix + name)
            if isinstance(found, DTensor) and id(param) in distributed:
                self.describe(param, found)

    def describe(self, param: nn.Parameter, x: DTensor) -> None:
        """Tell DCP, and ``x`` itself, where ``x``, laid out as the distributed parameter ``param``, lies."""
        locate(x, vars(param)["elements"])
        if self._layout.sharded:
            describe_for_dcp(x)


def _laid_out_as(raw: DTensor) -> Any:
    placements = raw.placements

    def hook(grad: Tensor) -> Tensor | None:
        if isinstance(grad, DTensor) and grad.placements != placements:
            return grad.redistribute(placements=placements)
        return None

    return hook
