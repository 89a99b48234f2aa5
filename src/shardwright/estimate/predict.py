"""``predict``: what a plan does to a model, as data."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from shardwright.distributed.config import ParallelConfig
from shardwright.distributed.models.blocks import numbers_to_globs
from shardwright.distributed.models.build import build_on_meta, load_config
from shardwright.distributed.plan import ParallelPlan
from shardwright.distributed.planning.data import wants_fsdp2
from shardwright.distributed.planning.decide import Split, decide, decide_around
from shardwright.distributed.planning.decided import DecidedPlan
from shardwright.distributed.planning.layout import ParameterLayout, parameter_layouts
from shardwright.distributed.planning.resolved import ResolvedPlan
from shardwright.distributed.planning.units import unit_names
from shardwright.distributed.precision import DTYPES, Precision
from shardwright.distributed.replay.reading import ModelReading
from shardwright.errors import ConfigError
from shardwright.estimate.context import ContextTraffic, context_notes, context_traffic
from shardwright.estimate.experts import expert_notes
from shardwright.estimate.gathering import Gathering, predict_gathering
from shardwright.estimate.memory import Memory, memory_per_rank
from shardwright.estimate.rows import Row, module_rows
from shardwright.estimate.traffic import Collective, predict_traffic

Model = str | os.PathLike[str] | PreTrainedConfig | nn.Module


@dataclass(frozen=True)
class Traffic:
    """What blocks of one kind send over the ``tp`` axis in one forward and backward of a micro-batch.

    Attributes:
        where: the glob of the blocks; ``""`` is what lies outside of them (embedding, head, loss).
        blocks: how many there are.
        collectives: of one block.
    """

    where: str
    blocks: int
    collectives: tuple[Collective, ...]

    def sent_per_token(self, tp: int) -> float:
        """Bytes that each rank sends per token, for one block."""
        return sum(call.sent(call.token_bytes, tp) for call in self.collectives)

    def sent_fixed(self, tp: int) -> float:
        """Bytes that each rank sends per micro-batch, however many tokens it has, for one block."""
        return sum(call.sent(call.fixed_bytes, tp) for call in self.collectives)


@dataclass(frozen=True)
class Prediction:
    """What a plan does to a model.

    Attributes:
        model: the model's class name.
        plan: the plan that applies, as it can be saved, edited and passed back.
        decided: all decisions; ``plan`` is a part of them.
        config: the degrees that were asked for, ``dp_shard`` filled in.
        weights: dtype in which parameters, gradients and AdamW's state are kept.
        blocks: glob of the repeated blocks -> how many.
        rows: one per pattern of modules.
        parameters: number of them, and how many tensor parallelism cuts.
        attributes: module glob -> sizes that the module's code sees on a rank.
        memory: bytes per rank.
        unsharded: bytes with one rank.
        traffic: TP collectives, by kind of block; tokens are those of a rank's part of the sequences.
        context: what context-parallel ranks send, by kind of module.
        gathering: what FSDP2 gathers and reduces; None where it has no part in it.
        notes: sentences of the plan and of its resolution.
        warnings: sentences that a user should act on.
    """

    model: str
    plan: ParallelPlan
    decided: DecidedPlan
    config: ParallelConfig
    weights: str
    blocks: dict[str, int]
    rows: tuple[Row, ...]
    parameters: int
    cut: int
    attributes: dict[str, dict[str, int]]
    memory: Memory
    unsharded: Memory
    traffic: tuple[Traffic, ...]
    gathering: Gathering | None
    notes: tuple[str, ...]
    context: tuple[ContextTraffic, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def cut_share(self) -> float:
        """The share of the parameters that tensor parallelism cuts, between 0 and 1."""
        return self.cut / self.parameters if self.parameters else 0.0

    def collectives(self) -> Counter[str]:
        """TP collectives of a whole training step, by kind."""
        return Counter({
            kind: sum(part.blocks * sum(call.kind == kind for call in part.collectives) for part in self.traffic)
            for kind in dict.fromkeys(call.kind for part in self.traffic for call in part.collectives)
        })  # fmt: skip

    def sent_per_token(self) -> float:
        """Bytes that each rank sends per token over the ``tp`` axis in a training step."""
        return sum(part.blocks * part.sent_per_token(self.config.tp) for part in self.traffic)

    def sent_fixed(self) -> float:
        """Bytes that each rank sends per micro-batch besides."""
        return sum(part.blocks * part.sent_fixed(self.config.tp) for part in self.traffic)


def predict(model: Model, config: ParallelConfig, *, weights: str = "float32") -> Prediction:
    """What the plan that applies does to ``model``: styles, memory and TP traffic. Nothing is run or allocated.

    Args:
        model: a checkpoint folder, a ``config.json``, a model type of transformers, a transformers config, or a model
            (on meta, for example). Folders are asked for their config only.
        config: ``dp_shard=-1`` counts as 1. ``precision.param`` is the dtype of the TP traffic.
        weights: dtype that the parameters are kept in; a model's own counts where ``model`` is one.

    Raises:
        ConfigError: there is no such model, its config is broken, or the degrees cannot work.
        PlanError: the model cannot be parallelized that way; the message says why.
    """
    if weights not in DTYPES:
        raise ConfigError(f"weights is {weights!r}; it must be one of {', '.join(DTYPES)}.")
    config = config.with_(dp_shard=config.least_dp_shard)
    built = model if isinstance(model, nn.Module) else build_on_meta(load_config(model), dtype=getattr(torch, weights))
    reading = ModelReading(built)
    weights_of = parameter_layouts(reading, None).values()
    settled = config.with_(precision=config.precision.settled(dtypes_of(weights_of)))
    decided = decided_plan(reading, settled, always_plan=True)
    plan, resolved = decided.plan, decided.tensor
    assert plan is not None, "one was asked for"
    assert resolved is not None
    layouts = list(parameter_layouts(reading, resolved, decided.experts).values())
    whole = [replace(layout, placement=_WHOLE, ep=None) for layout in layouts]
    itemsize = _compute_dtype(layouts, settled).itemsize
    context = context_traffic(decided.context, settled, itemsize)
    return Prediction(
        model=type(built).__name__,
        plan=plan,
        decided=decided,
        config=config,
        weights=", ".join(dtypes_of(layouts)),
        blocks=dict(Counter(numbers_to_globs(name) for name in reading.blocks)),
        rows=tuple(module_rows(built, plan, resolved, layouts, settled)),
        parameters=sum(layout.numel for layout in layouts),
        cut=sum(layout.numel for layout in layouts if layout.cut),
        attributes=_attributes(resolved),
        memory=memory_per_rank(layouts, settled),
        unsharded=memory_per_rank(whole, ParallelConfig(dp_shard=1)),
        traffic=tuple(_traffic(reading, decided, resolved, _compute_dtype(layouts, settled))),
        gathering=predict_gathering(layouts, decided, settled),
        context=context,
        notes=tuple(
            dict.fromkeys(
                (
                    *decided.notes,
                    *expert_notes(reading, decided.experts, itemsize),
                    *context_notes(context),
                )
            )
        ),
        warnings=decided.warnings,
    )


_WHOLE = torch.distributed.tensor.Replicate()


def dtypes_of(layouts: Iterable[ParameterLayout]) -> list[str]:
    """The dtypes that the parameters are kept in, the commonest first."""
    counts: Counter[torch.dtype] = Counter()
    for layout in layouts:
        counts[layout.dtype] += layout.numel
    return [str(dtype).removeprefix("torch.") for dtype, _ in counts.most_common()]


def _attributes(resolved: ResolvedPlan) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for name, values in resolved.attributes.items():
        if values:
            found.setdefault(numbers_to_globs(name), {}).update(values)
    return found


def _compute_dtype(layouts: Iterable[ParameterLayout], config: ParallelConfig) -> torch.dtype:
    return getattr(torch, dtypes_of(layouts)[0] if config.precision == Precision() else config.precision.param)


def decided_plan(
    reading: ModelReading, config: ParallelConfig, *, always_plan: bool = False, split: Split | None = None
) -> DecidedPlan:
    """What :func:`shardwright.parallelize` would decide on so many ranks.

    Args:
        config: with all degrees and the precision settled.
        always_plan: choose a tensor-parallel plan with one rank, too, for a report.
        split: what is decided about the ranks of one model already.
    """
    fsdp2 = wants_fsdp2(config, config.averaging_ranks)
    dtype = None if config.precision == Precision() else getattr(torch, config.precision.param)
    own = unit_names(reading) if config.engine == "megatron_fsdp" else []
    if split is not None:
        return decide_around(reading, config, split, fsdp2=fsdp2, compute_dtype=dtype, own_units=own)
    return decide(
        reading,
        config,
        tp=config.tp,
        ep=config.ep,
        cp=config.cp,
        fsdp2=fsdp2,
        compute_dtype=dtype,
        always_plan=always_plan,
        own_units=own,
    )


def _traffic(
    reading: ModelReading, decided: DecidedPlan, resolved: ResolvedPlan, dtype: torch.dtype
) -> Iterable[Traffic]:
    """Blocks that send the same are one line, in the model's order; what lies outside comes last.

    Args:
        dtype: that activations are sent in.
    """
    blocks = reading.blocks
    traffic = predict_traffic(reading, resolved, dtype.itemsize, summing=decided.summing)
    outside = traffic.pop("")
    kinds: dict[Any, list[tuple[Collective, ...]]] = {}
    for name in blocks:
        if calls := tuple(replace(call, cause=numbers_to_globs(call.cause)) for call in traffic.get(name, ())):
            signature = frozenset(Counter(replace(call, cause="") for call in calls).items())
            kinds.setdefault((numbers_to_globs(name), signature), []).append(calls)
    for (where, _), alike in kinds.items():
        yield Traffic(where, len(alike), alike[0])
    if outside:
        yield Traffic("", 1, tuple(outside))


def to_dict(prediction: Prediction) -> dict[str, Any]:
    """Everything in ``prediction`` as plain data, for JSON."""
    config, tp = prediction.config, prediction.config.tp
    return {
        "model": prediction.model,
        "parallel": config.to_dict(),
        "weights": prediction.weights,
        "plan": prediction.plan.to_dict(),
        "decided": prediction.decided.to_dict(),
        "blocks": prediction.blocks,
        "modules": [row.to_dict() for row in prediction.rows],
        "rank_local_attributes": prediction.attributes,
        "parameters": {"total": prediction.parameters, "cut": prediction.cut, "cut_share": prediction.cut_share},
        "bytes_per_rank": prediction.memory.to_dict(),
        "bytes_unsharded": prediction.unsharded.to_dict(),
        "tp_collectives": {
            "per_training_step": dict(prediction.collectives()),
            "sent_per_token": prediction.sent_per_token(),
            "sent_per_micro_batch": prediction.sent_fixed(),
            "parts": [_traffic_dict(part, tp) for part in prediction.traffic],
        },
        "context": [part.to_dict() for part in prediction.context],
        "fsdp2": None if prediction.gathering is None else prediction.gathering.to_dict(),
        "notes": list(prediction.notes),
        "warnings": list(prediction.warnings),
    }


def _traffic_dict(part: Traffic, tp: int) -> dict[str, Any]:
    return {
        "where": part.where or "outside of the blocks",
        "blocks": part.blocks,
        "sent_per_token": part.sent_per_token(tp),
        "sent_per_micro_batch": part.sent_fixed(tp),
        "collectives": [
            {
                "kind": call.kind,
                "phase": "backward" if call.backward else "forward",
                "bytes_per_token": call.token_bytes,
                "fixed_bytes": call.fixed_bytes,
                "cause": call.cause,
            }
            for call in part.collectives
        ],
    }
