"""Whether a plan is exact for a model: every rank replayed in this process, without weights, before anything is cut.

Plans read off the dataflow were found this way. A plan from elsewhere (transformers', a user's) is only somebody's word
until it has been replayed, and a layer cut in the wrong place is often not an error but another function.
"""

from __future__ import annotations

from torch.distributed.tensor import Shard

from shardwright._torch import StridedShard
from shardwright.distributed.planning.resolved import ResolvedPlan
from shardwright.distributed.replay.rank_model import Sharding
from shardwright.distributed.replay.reading import ModelReading, Recording
from shardwright.distributed.replay.record import CODE_ERRORS, Mismatch
from shardwright.distributed.replay.runs import (
    Finding,
    Record,
    rank_runs,
    some_ranks_forward,
)
from shardwright.distributed.replay.weightless import WeightlessCopy
from shardwright.distributed.styles import make_style
from shardwright.distributed.styles.base import Style
from shardwright.distributed.styles.cuts import Cut, contiguous, packed
from shardwright.distributed.styles.replicated import ReplicatedPartialGradient


class NotReplayable(Exception):
    """The plan has something in it that cannot be replayed."""


def why_not_exact(reading: ModelReading, resolved: ResolvedPlan) -> str | None:
    """What goes wrong when the model runs on slices as ``resolved`` says; None where nothing does.

    None as well where the model cannot be replayed: its inputs cannot be guessed, or its code is not deterministic.
    """
    recording = replayable(reading, resolved)
    if recording is None:
        return None
    weightless, inputs, record = recording.weightless, recording.inputs, recording.record
    try:
        sharding = sharding_of(weightless, resolved)
    except NotReplayable:
        return None
    try:
        some_ranks_forward(weightless, record, inputs, sharding, resolved.tp)
        finding = rank_runs(weightless, record, inputs, sharding, resolved.tp)
    except Mismatch as error:
        return f"{_told(weightless, str(error))} gets other values on slices than in one process"
    except CODE_ERRORS as error:
        return f"the model's code does not run on slices ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
    return _undeclared(weightless, resolved, finding) or _overdeclared(weightless, resolved, record, finding)


def replayable(reading: ModelReading, resolved: ResolvedPlan) -> Recording | None:
    """A recorded run that comes out the same when it is replayed with nothing cut."""
    recording = reading.recording()
    if recording is not None and not _uniform(recording.weightless, resolved):
        recording = reading.recording(every_block=True)
    return recording if recording is not None and recording.repeatable else None


def _uniform(weightless: WeightlessCopy, resolved: ResolvedPlan) -> bool:
    """Whether what stands for several blocks in the weightless copy is cut alike in all of them."""
    kind = weightless.repeats.kind_of
    known: dict[str, object] = {}
    alike: list[bool] = []
    for name, use in resolved.modules.items():
        sizes = resolved.attributes.get(name), resolved.arguments.get(name), resolved.widths.get(name)
        cut = use.style, use.options.items(), sizes
        alike.append(known.setdefault(kind(name), cut) == cut)
    for (owner, name), style in resolved.parameters.items():
        alike.append(known.setdefault(kind(f"{owner}.{name}"), style) == style)
    return all(alike)


def _told(weightless: WeightlessCopy, name: str) -> str:
    known = name in weightless.stubs or name in dict(weightless.model.named_parameters())
    return weightless.repeats.original_name(name) if known else f"the model's {name}"


def sharding_of(weightless: WeightlessCopy, resolved: ResolvedPlan) -> Sharding:
    """The plan in the terms of the replay.

    Raises:
        NotReplayable: it says something for which there are none.
    """
    sharding = Sharding()
    names = {name: weightless.repeats.original_name(name) for name, _ in weightless.model.named_modules()}
    summing = _inside_summing(resolved)
    for name, stub in weightless.stubs.items():
        use = resolved.modules.get(names[name])
        if use is None or stub.kind == "opaque" or names[name].startswith(summing):
            continue
        if (cut := use.made.cut_out(stub.width_out)) is not None:
            sharding.cuts_out[name] = cut
        if (cut := use.made.cut_in(stub.width_in)) is not None:
            sharding.cuts_in[name] = cut
    for (owner, parameter), style in resolved.parameters.items():
        if resolved.modules[owner].made.sums:
            continue
        for name in (name for name, original in names.items() if original == owner):
            param = weightless.model.get_submodule(name)._parameters[parameter]
            assert param is not None
            placement = make_style(style).placement(weightless.model.get_submodule(name), parameter)
            if not isinstance(placement, (Shard, StridedShard)):
                continue
            if placement.dim != 0:
                raise NotReplayable(f"{owner}.{parameter} is cut along dim {placement.dim}")
            pieces = placement.split_factor if isinstance(placement, StridedShard) else 1
            sharding.parameters[f"{name}.{parameter}"] = _pieces(len(param), int(pieces))
    for name, original in names.items():
        if values := resolved.attributes.get(original):
            sharding.attributes[name] = values
        if original in resolved.arguments:
            sharding.arguments[name] = resolved.arguments[original]
        if original in resolved.widths:
            sharding.widths[name] = resolved.widths[original]
    return sharding


def _pieces(width: int, pieces: int) -> Cut:
    return contiguous(width) if pieces == 1 else packed(width, pieces)


PARTIAL = ReplicatedPartialGradient.name


def _declared(style: Style) -> bool:
    """Whether a plan with this style says that gradients are sums because the module works on slices."""
    return style.rank_local and style.partial_gradients


def _undeclared(weightless: WeightlessCopy, resolved: ResolvedPlan, finding: Finding) -> str | None:
    """Gradients that are sums over the ranks, but that the plan does not sum."""
    for name in sorted(finding.partial_parameters):
        owner, _, parameter = name.rpartition(".")
        original = weightless.repeats.original_name(owner)
        if not _declared(resolved.modules[original].made):
            return f"{original}.{parameter} works on slices, and its gradient has to be summed ({PARTIAL!r})"
    for name in sorted(finding.partial_outputs):
        original = weightless.repeats.original_name(name)
        made = resolved.modules[original].made
        if not (_declared(made) or made.sums_output_gradient):
            return f"{original} is whole, but what reads it works on slices"
    return None


def _overdeclared(weightless: WeightlessCopy, resolved: ResolvedPlan, record: Record, finding: Finding) -> str | None:
    """Gradients that the plan sums, but that are whole on every rank."""
    if resolved.sequence_parallel:
        return None  # whole parameters see a part of the sequence, and so a part of their gradient
    inside = _inside_summing(resolved)
    for name in sorted(record.param_grads.keys() - finding.partial_parameters):
        owner, _, parameter = name.rpartition(".")
        original = weightless.repeats.original_name(owner)
        use = resolved.modules.get(original)
        if use is not None and _declared(use.made) and not original.startswith(inside):
            return f"the gradient of {original}.{parameter} is whole on every rank, but is summed ({PARTIAL!r})"
    return None


def _inside_summing(resolved: ResolvedPlan) -> tuple[str, ...]:
    return tuple(f"{name}." for name, use in resolved.modules.items() if use.made.sums)
