"""Whether experts that are modules of their own can be computed on ranks of their own: tried, and what was found.

The module whose code calls them is found in the recorded run. Then that code runs in the copy without weights, as it
will run on ranks (:mod:`shardwright.distributed.runtime.expert_loop`), with the tokens of each expert computed
together, in another order and in two parts. Where the result is that of the plain code, the code only hands tokens to
experts and takes their results, and experts keep tokens apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from shardwright._torch import DropoutNd, tree_leaves
from shardwright.distributed.planning.decided import Experts, Listed
from shardwright.distributed.planning.listed_experts import ListedExperts
from shardwright.distributed.replay.module_calls import ModuleCall, as_now
from shardwright.distributed.replay.pointwise import pointwise, pointwise_run
from shardwright.distributed.replay.reading import ModelReading, Recording
from shardwright.distributed.replay.record import CODE_ERRORS, Mismatch, same
from shardwright.distributed.runtime.expert_calls import Called, ExpertCall
from shardwright.distributed.runtime.expert_loop import Loop, run_together
from shardwright.errors import PlanError, UnsupportedError

_AT_MOST = 2  # calls of the same code that are tried


def spread_list(reading: ModelReading, listed: ListedExperts, ep: int) -> Experts:
    """How the experts of a list are called.

    Raises:
        PlanError: the code that calls them cannot do with experts that are computed together on other ranks.
    """
    recording = _recording(reading, listed)
    if recording is None:
        raise PlanError(listed.why_not(ep, f"the model could not be tried without its weights: {reading.why_not()}"))
    module = reading.modules[listed.name]
    try:
        _check_parameters(module)
        caller = _caller(recording, listed.name)
        loop = Loop(listed.name.removeprefix(caller).removeprefix("."), listed.names)
        called = _tried(recording, caller, loop)
    except UnsupportedError as error:
        raise PlanError(listed.why_not(ep, str(error).removesuffix(" Leave ep out.").removesuffix("."))) from None
    own = tuple(name for name, _ in module.named_parameters(remove_duplicate=False))
    return Experts(listed.count, "listed", (), own, Listed(caller, loop, called))


def _recording(reading: ModelReading, listed: ListedExperts) -> Recording | None:
    """The recorded run of a copy that has the whole list: two experts may stand for all, as for blocks."""
    recording = reading.recording()
    if recording is None:
        return None
    weightless = recording.weightless
    kept = weightless.model.get_submodule(weightless.repeats.stand_in(listed.name))
    return recording if set(listed.names) <= set(kept._modules) else reading.recording(every_block=True)


def _check_parameters(module: nn.Module) -> None:
    parameters = [param for _, param in module.named_parameters(remove_duplicate=False)]
    if len(set(map(id, parameters))) < len(parameters):
        raise UnsupportedError("They share parameters.")
    if any(param.ndim == 0 for param in parameters):
        raise UnsupportedError("They have parameters without a dim.")
    if len({param.dtype for param in parameters}) > 1:
        raise UnsupportedError("Their parameters have several dtypes.")


def _caller(recording: Recording, name: str) -> str:
    """The innermost module that is called around the list, or the list itself where it has a forward."""
    counts, repeats = recording.record.calls.counts, recording.weightless.repeats
    module = name
    while module and repeats.stand_in(module) not in counts:
        module = module.rpartition(".")[0]
    if not module:
        raise UnsupportedError("No module around them was called in a trial.")
    return module


def _tried(recording: Recording, caller: str, loop: Loop) -> Called:
    weightless = recording.weightless
    name = weightless.repeats.stand_in(caller)
    module = weightless.model.get_submodule(name)
    calls = pointwise_run(weightless, recording.inputs, {name: module}).calls[name][:_AT_MOST]
    found = set()
    with pointwise(weightless):
        for call in calls:
            for training in (False, True):
                with _mode(module, loop, training):
                    found.add(_same_both_ways(module, loop, call))
    if len(found) != 1:
        raise UnsupportedError("Its code calls them in several ways")
    return found.pop()


@contextmanager
def _mode(module: nn.Module, loop: Loop, training: bool) -> Iterator[None]:
    """Training mode inside, for the code around experts, with nothing dropped by modules."""
    before = {part: part.training for part in module.modules()}
    inside = {part for expert in loop.modules(module) for part in expert.modules()}
    try:
        for part in before:
            part.training = training and part not in inside and not isinstance(part, DropoutNd)
        yield
    finally:
        for part, mode in before.items():
            part.training = mode


def _same_both_ways(module: nn.Module, loop: Loop, call: ModuleCall) -> Called:
    experts, asked = loop.modules(module), list[ExpertCall]()

    def compute(expert: nn.Module, one: ExpertCall, rows: list[Tensor]) -> Tensor:
        args, kwargs = one.form.arguments(rows)
        result = expert(*args, **kwargs)
        if not isinstance(result, Tensor) or result.ndim < 2 or result.shape[0] != rows[0].shape[0]:
            raise UnsupportedError("An expert returns something else than one row for each token")
        return result

    def like(one: ExpertCall) -> Tensor:
        form = compute(experts[one.expert], one, [x[:1] for x in one.rows()])
        return form.new_zeros(*one.lead, *form.shape[1:])

    def answer(calls: list[ExpertCall]) -> list[Tensor]:
        asked.extend(calls)
        return [_in_parts(one, lambda rows, one=one: compute(experts[one.expert], one, rows)) for one in calls]

    outcomes = []
    before = {part: {key: as_now(x) for key, x in part._buffers.items()} for part in module.modules()}
    for together in (False, True):
        for part, buffers in before.items():
            part._buffers.update({key: as_now(x) for key, x in buffers.items()})
        torch.default_generator.manual_seed(1)
        args, kwargs = as_now(call.args), as_now(call.kwargs)
        try:
            if together:
                output = run_together(module, loop, module.forward, args, kwargs, like, answer)
            else:
                output = module.forward(*args, **kwargs)
        except UnsupportedError:
            raise
        except (Mismatch, *CODE_ERRORS) as error:
            raise UnsupportedError(f"Their code does not run so ({type(error).__name__}: {error})") from error
        left = [part._buffers for part in module.modules()]
        outcomes.append([x for x in tree_leaves((output, args, kwargs, left)) if isinstance(x, Tensor)])
    for part, buffers in before.items():
        part._buffers.update(buffers)
    plain, spread = outcomes
    if len(plain) != len(spread) or not all(same(x, y) for x, y in zip(spread, plain, strict=True)):
        raise UnsupportedError("It computes something else when the tokens of an expert are computed together")
    if not asked:
        raise UnsupportedError("Its code did not call them in a trial")
    return Called.by(asked)


def _in_parts(call: ExpertCall, compute: Any) -> Tensor:
    """The result of a call, its last tokens computed first and by themselves."""
    rows, half = call.rows(), call.count // 2
    parts = [compute([x[half:].flip(0) for x in rows]).flip(0), compute([x[:half] for x in rows])]
    return torch.cat(parts[::-1]).reshape(*call.lead, *parts[0].shape[1:])
