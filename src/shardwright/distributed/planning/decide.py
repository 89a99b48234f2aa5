"""``decide``: from a model that has been read, and a config, to everything that will be done to the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from shardwright.distributed.config import ParallelConfig
from shardwright.distributed.models.blocks import by_list, every_nth
from shardwright.distributed.plan import ParallelPlan
from shardwright.distributed.planning.context import plan_context
from shardwright.distributed.planning.context_method import ContextMethod
from shardwright.distributed.planning.context_plan import ContextPlan
from shardwright.distributed.planning.data import decide_data
from shardwright.distributed.planning.decided import DecidedPlan, ExpertPlan, Tiles
from shardwright.distributed.planning.experts import check_all_run, decide_experts
from shardwright.distributed.planning.layout import parameter_layouts
from shardwright.distributed.planning.mlps import mlp_names
from shardwright.distributed.planning.resolved import ResolvedPlan
from shardwright.distributed.planning.sources import CustomPlan
from shardwright.distributed.planning.tensor import plan_and_resolve
from shardwright.distributed.planning.units import blocks_in_use, unit_names
from shardwright.distributed.replay.reading import ModelReading
from shardwright.errors import ConfigError


def decide(
    reading: ModelReading,
    config: ParallelConfig,
    *,
    tp: int,
    ep: int = 1,
    fsdp2: bool,
    cp: int = 1,
    compute_dtype: torch.dtype | None = None,
    custom: CustomPlan | None = None,
    always_plan: bool = False,
    own_units: Sequence[str] = (),
) -> DecidedPlan:
    """All decisions, in the order in which they are executed. Nothing is changed, sent or allocated.

    Args:
        tp: tensor-parallel ranks. The degrees in ``config`` are not read: a mesh has them.
        ep: expert-parallel ranks.
        fsdp2: whether FSDP2 shards the model.
        cp: context-parallel ranks.
        compute_dtype: in which FSDP2 gathers parameters; None where each is gathered in its own.
        custom: a tensor-parallel plan, instead of the one that ``config`` names or that would be chosen.
        always_plan: choose a tensor-parallel plan with one rank, too, for a report.
        own_units: modules that another engine gathers by itself.

    Raises:
        PlanError: a plan that does not fit the model or ``tp``, or is not exact; units that FSDP2 cannot make.
        ConfigError: settings that would do nothing.
    """
    experts = decide_experts(reading, ep)
    check_all_run(reading, experts, sharers=tp * cp)
    context = plan_context(reading, ContextMethod(config.context_method, cp, tp)) if cp > 1 else None
    split = Split(None, None, context, experts)
    if tp > 1 or always_plan:
        plan, resolved = plan_and_resolve(
            reading,
            custom if custom is not None else config.plan,
            tp,
            sequence_parallel=config.sequence_parallel,
            experts=experts,
            gathered=() if context is None else context.regions,
        )
        split = Split(plan, resolved, context, experts)
    return decide_around(reading, config, split, fsdp2=fsdp2, compute_dtype=compute_dtype, own_units=own_units)


@dataclass(frozen=True)
class Split:
    """How the ranks of one model share its work: what a plan says of tensors, sequences and experts.

    Attributes: as those of :class:`shardwright.distributed.planning.decided.DecidedPlan`.
    """

    plan: ParallelPlan | None
    tensor: ResolvedPlan | None
    context: ContextPlan | None
    experts: ExpertPlan | None

    @classmethod
    def of(cls, decided: DecidedPlan) -> Split:
        return cls(decided.plan, decided.tensor, decided.context, decided.experts)


def decide_around(
    reading: ModelReading,
    config: ParallelConfig,
    split: Split,
    *,
    fsdp2: bool,
    compute_dtype: torch.dtype | None = None,
    own_units: Sequence[str] = (),
) -> DecidedPlan:
    """All decisions but those of ``split``: units, recomputed and compiled blocks, tiles.

    Args and errors: as those of :func:`decide`.
    """
    resolved, context, experts = split.tensor, split.context, split.experts
    one_by_one = config.activation_checkpointing != "none" or config.compile_backend is not None
    blocks = unit_names(reading) if fsdp2 or own_units or one_by_one else []
    recomputed = _recomputed(reading, blocks, config)
    data = None
    if fsdp2:
        layouts = parameter_layouts(reading, resolved, experts)
        data = decide_data(reading, blocks, layouts, config, compute_dtype=compute_dtype, experts=experts)
    tiles = _tiles(reading, config, context)
    return DecidedPlan(
        plan=split.plan,
        tensor=resolved,
        context=context,
        data=data,
        experts=experts,
        blocks=tuple(blocks),
        recomputed=tuple(recomputed),
        activation_checkpointing=config.activation_checkpointing,
        offload=config.offload_activations,
        compiled=tuple(_compiled(reading, blocks, tiles, experts, context))
        if config.compile_backend is not None
        else (),
        compile_backend=config.compile_backend,
        # What gathers its parameters, or runs twice, sees to its replicated parameters by itself.
        summing=(*(data.names if data is not None else own_units), *recomputed),
        tiles=tiles,
        readable=tuple(name for name in (reading.embedding, reading.head) if name is not None),
        notes=(*(resolved.notes if resolved is not None else ()), *(context.notes() if context is not None else ())),
        warnings=tuple(_warnings(reading, blocks, resolved)),
    )


def _warnings(reading: ModelReading, blocks: list[str], resolved: ResolvedPlan | None) -> Iterator[str]:
    if resolved is not None:
        yield from resolved.warnings
    if blocks and (found := blocks_in_use(reading, blocks)) is not None:
        yield found


def _tiles(reading: ModelReading, config: ParallelConfig, context: ContextPlan | None) -> Tiles:
    if config.loss_tiles > 1 and reading.head is None:
        raise ConfigError(
            f"loss_tiles is {config.loss_tiles}, but {type(reading.model).__name__} does not say which module computes "
            "its logits (get_output_embeddings). Leave loss_tiles out, or compute the loss with "
            "shardwright.losses.linear_cross_entropy."
        )
    whole = () if context is None else context.regions  # a tile is no part of the sequence that such a part gathers
    mlps = [name for name in mlp_names(reading) if name not in whole] if config.mlp_tiles > 1 else []
    if config.mlp_tiles > 1 and not mlps:
        raise ConfigError(
            f"mlp_tiles is {config.mlp_tiles}, but no block of {type(reading.model).__name__} has a part with linear "
            "layers that was seen to work on each position by itself"
            + (f" ({why})" if (why := reading.why_not()) else "")
            + ": nothing would be computed in tiles. Leave mlp_tiles out."
        )
    head = reading.head if config.loss_tiles > 1 else None
    return Tiles(head, config.loss_tiles, tuple(mlps), config.mlp_tiles)


def _compiled(
    reading: ModelReading, blocks: list[str], tiles: Tiles, experts: ExpertPlan | None, context: ContextPlan | None
) -> list[str]:
    """What is compiled: the blocks. Of one with tiles, or parts that send to other ranks, what is around these."""
    eager = (
        *tiles.mlps,
        *(experts.exchanging if experts is not None else ()),
        *((*context.attention, *context.regions, *context.recorded) if context is not None else ()),
    )
    found: list[str] = []
    for block in blocks:
        around = any(name.startswith(f"{block}.") for name in eager)
        found += _parts_around(reading, block, eager) if around else [block]
    return found


def _parts_around(reading: ModelReading, name: str, eager: Sequence[str]) -> Iterator[str]:
    """The outermost modules below ``name`` that hold matrices and none of ``eager``."""
    for child, part in reading.modules[name].named_children():
        below = f"{name}.{child}"
        if below in eager:
            continue
        if any(other.startswith(f"{below}.") for other in eager):
            yield from _parts_around(reading, below, eager)
        elif any(param.ndim > 1 for param in part.parameters()):
            yield below


def _recomputed(reading: ModelReading, blocks: list[str], config: ParallelConfig) -> list[str]:
    """The blocks that are recomputed in backward."""
    lists, n = by_list(blocks, reading.blocks), config.checkpointed_every
    chosen = every_nth(lists, n)
    if n > 1 and not chosen:
        longest = max(map(len, lists.values()), default=0)
        raise ConfigError(
            f"activation_checkpointing is {config.activation_checkpointing!r}, but the model's longest list of blocks "
            f"has {longest}: nothing would be recomputed. Choose a smaller number, or none."
        )
    return chosen
