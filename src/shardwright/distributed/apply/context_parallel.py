"""Context parallelism: executes a :class:`ContextPlan`."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from shardwright.distributed.planning.context_plan import ContextPlan
from shardwright.distributed.runtime.context.attention import HOLDER, ContextAttention, Kernel
from shardwright.distributed.runtime.context.base import Context, Meshes
from shardwright.distributed.runtime.context.blocks import ContextBlock, ContextLayer, ContextRegion, WholeContextBlock
from shardwright.distributed.runtime.context.outputs import HIDDEN, LOGITS, ContextModel, Recorded
from shardwright.distributed.runtime.forward import wrap_forward
from shardwright.distributed.runtime.regions import SequenceRegion


def apply_context_parallel(
    model: nn.Module,
    cp_mesh: DeviceMesh,
    both: DeviceMesh | None,
    plan: ContextPlan,
    kernels: Mapping[str, Kernel],
) -> None:
    """Wrap the modules of ``model``, in place. Nothing is sent, and no parameter is touched.

    Args:
        cp_mesh: the one-dimensional ``cp`` mesh.
        both: ``cp`` x ``tp``, where there are tensor-parallel ranks.
        kernels: the function of every module in ``plan.attention``; the table of them has
            :func:`~shardwright.distributed.runtime.context.attention.context_attention`.
    """
    context = Context(Meshes(cp_mesh, both))
    for name, use in plan.attention.items():
        module = model.get_submodule(name)
        attention = ContextAttention(
            module,
            context,
            kernels[name],
            use.kernel,
            own_keys=use.own_keys,
            by_heads=use.method == "ulysses",
            all_keys=use.all_keys,
        )
        module.__dict__[HOLDER] = attention
        wrap_forward(module, attention)
    for name, places in plan.regions.items():
        module = model.get_submodule(name)
        # What sequence parallelism gathers is this rank's part under context parallelism, which gathers next.
        around = ContextRegion(module, context, places)
        wrap_forward(module, around, inside=lambda each: isinstance(each, SequenceRegion))
    for name, block in plan.blocks.items():
        module = model.get_submodule(name)
        wrap_forward(module, ContextBlock(module, context, block.stream, block.places))
    for name in plan.whole:
        wrap_forward(model.get_submodule(name), WholeContextBlock(context))
    for name in plan.layers:
        wrap_forward(model.get_submodule(name), ContextLayer(context))
    for name, places in plan.recorded.items():
        wrap_forward(model.get_submodule(name), Recorded(context, places))
    for name in filter(None, plan.owners):
        owner = model.get_submodule(name)
        wrap_forward(owner, ContextModel(owner, context, caches=plan.caches, kept=(*LOGITS, *HIDDEN)))
    wrap_forward(model, ContextModel(model, context, caches=plan.caches))
