"""Running a weightless copy: once in full, then rank by rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from shardwright._torch import tree_leaves
from shardwright.distributed.replay.idle_use import IdleUse
from shardwright.distributed.replay.module_calls import ModuleCalls, recorded_calls
from shardwright.distributed.replay.rank_model import Sharding, as_on_rank
from shardwright.distributed.replay.record import (
    CODE_ERRORS,
    TOLERANCE,
    FullRun,
    Idle,
    Mismatch,
    RankRun,
    Recorder,
    same,
)
from shardwright.distributed.replay.short_chunks import Chunks
from shardwright.distributed.replay.watch import Touched, listening, reading
from shardwright.distributed.replay.weightless import WeightlessCopy
from shardwright.distributed.styles.cuts import Cut


@dataclass(frozen=True)
class Inputs:
    """Arguments of a forward.

    Attributes:
        called: name of the module that is called; the model itself, where what it wants cannot be guessed but what it
            wraps can be called.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    called: str = ""


@dataclass
class Record:
    """What the full run left behind.

    Attributes:
        run: the recorder.
        outputs: the model's output tensors.
        output_grads: the gradients that backward started from; None for outputs without one.
        param_grads: gradient of every parameter that is not a stub's.
        reads: (module, attribute) -> integer that the forward read there.
        arguments: module -> shapes of its tensor arguments that need no gradient.
        first: module -> name and width of the first of its tensor arguments that needs one.
        input_grad: gradient of the first floating-point input; None where there is none.
        exposed: stubs whose weight is used by other code than their own forward, too.
        idle: kinds of modules in the blocks of which a parameter was used while they did not run.
        without_gradient: kinds of modules in the blocks that ran with gradients switched off.
        calls: what every module was called with.
        backward_failure: why the backward could not be run; then there are no gradients in here.
    """

    run: FullRun
    outputs: list[Tensor]
    output_grads: list[Tensor | None]
    param_grads: dict[str, Tensor]
    reads: dict[tuple[str, str], int]
    arguments: dict[str, dict[str, torch.Size]]
    first: dict[str, tuple[str, int]]
    exposed: frozenset[str]
    idle: frozenset[str]
    without_gradient: frozenset[str]
    calls: ModuleCalls
    input_grad: Tensor | None
    backward_failure: str


@dataclass
class Finding:
    """What rank runs showed of a sharding that is exact.

    Attributes:
        partial_parameters: whole parameters whose gradient is a sum over the ranks.
        partial_outputs: stub -> the features of its whole output whose gradient is a sum over the ranks.
    """

    partial_parameters: set[str] = field(default_factory=set)
    partial_outputs: dict[str, Tensor] = field(default_factory=dict)


def full_run(weightless: WeightlessCopy, inputs: Inputs, seed: int = 0) -> Record:
    """Run the model in full, forward and backward, and write everything down."""
    run = FullRun(seed)
    reads: dict[tuple[str, str], int] = {}
    arguments: dict[str, dict[str, torch.Size]] = {}
    first: dict[str, tuple[str, int]] = {}
    model, idle = weightless.model, IdleUse(weightless)
    touched = Touched({name: model.get_submodule(name) for name in weightless.stubs})
    with recorded_calls(model) as calls, idle, reading(model, reads), listening(model, arguments, first), touched:
        outputs, leaf = _forward(weightless, run, inputs)
    generator = torch.Generator().manual_seed(seed + 2)
    grads = [torch.randn(o.shape, generator=generator).to(o.dtype) if o.requires_grad else None for o in outputs]
    _clear_grads(weightless.model)
    try:
        _backward(outputs, grads, retain=True)
        failure = ""
    except CODE_ERRORS as error:  # a backward that is written by hand and calls modules (a reversible network)
        failure = f"{type(error).__name__}: {error}".partition("\n")[0]
    return Record(
        run=run,
        outputs=outputs,
        output_grads=grads,
        param_grads=_param_grads(weightless),
        reads=reads,
        arguments=arguments,
        first=first,
        exposed=frozenset(touched.names),
        idle=frozenset(idle.outside),
        without_gradient=frozenset(idle.without_gradient),
        calls=calls,
        input_grad=_grad(leaf),
        backward_failure=failure,
    )


def check_chunks(weightless: WeightlessCopy, record: Record, inputs: Inputs) -> None:
    """Replay the forward once with the model's own chunks: they must not matter.

    Raises:
        as :func:`rank_runs`.
    """
    chunks, weightless.chunks = weightless.chunks, Chunks()
    try:
        if chunks:
            _rank_forward(weightless, record, inputs, RankRun(record.run, 0, 1, {}, {}), gradients=False)
    finally:
        weightless.chunks = chunks


def some_ranks_forward(
    weightless: WeightlessCopy, record: Record, inputs: Inputs, sharding: Sharding, size: int
) -> None:
    """Replay the forward of the first and the last rank only: enough to find out most of what does not work.

    Raises:
        as :func:`rank_runs`.
    """
    for rank in sorted({0, size - 1}):
        run = RankRun(record.run, rank, size, sharding.cuts_in, sharding.cuts_out)
        with as_on_rank(weightless.model, sharding, run):
            _rank_forward(weightless, record, inputs, run)


def rank_runs(weightless: WeightlessCopy, record: Record, inputs: Inputs, sharding: Sharding, size: int) -> Finding:
    """Replay every rank of ``size``, forward and backward.

    Raises:
        Mismatch: some tensor or gradient is not what it must be.
        CODE_ERRORS: the model's code does not run on slices.
    """
    runs = []
    for rank in range(size):
        run = RankRun(record.run, rank, size, sharding.cuts_in, sharding.cuts_out)
        with as_on_rank(weightless.model, sharding, run):
            outputs, leaf = _rank_forward(weightless, record, inputs, run)
            _clear_grads(weightless.model)
            _backward(outputs, record.output_grads, retain=False)
            runs.append((run, _param_grads(weightless)))
            if record.input_grad is not None and not same(_filled(_grad(leaf), record.input_grad), record.input_grad):
                raise Mismatch("the gradient of the input")
    return _compare_gradients(record, sharding, runs, size)


def _rank_forward(
    weightless: WeightlessCopy, record: Record, inputs: Inputs, run: RankRun, *, gradients: bool = True
) -> tuple[list[Tensor], Tensor | None]:
    outputs, leaf = _forward(weightless, run, inputs, gradients=gradients)
    if len(outputs) != len(record.outputs):
        raise Mismatch("output")
    for mine, whole in zip(outputs, record.outputs, strict=True):
        if not same(mine, whole):
            raise Mismatch("output")
    return outputs, leaf


def _grad(leaf: Tensor | None) -> Tensor | None:
    return None if leaf is None else leaf.grad


def _filled(grad: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if grad is None else grad


def _compare_gradients(
    record: Record, sharding: Sharding, runs: list[tuple[RankRun, dict[str, Tensor]]], size: int
) -> Finding:
    finding = Finding()
    for key, call in record.run.calls.items():
        whole, found = call.output_grad, [run.grads.get(key) for run, _ in runs]
        grads = [grad for grad in found if grad is not None]
        if whole is None and not any(bool(grad.any()) for grad in grads):
            continue
        if whole is None or len(grads) < size:
            raise Mismatch(call.name)
        cut = sharding.cuts_out.get(call.name)
        if cut is not None:
            _require_sum(call.name, whole, grads, cut, -1, size)
        elif not all(same(grad, whole) for grad in grads):
            finding.partial_outputs[call.name] = _partial_features(call.name, whole, grads)
    for name, whole in record.param_grads.items():
        grads = [params.get(name, torch.zeros(())) for _, params in runs]
        if name in sharding.parameters:
            _require_sum(name, whole, grads, sharding.parameters[name], 0, size)
        elif not all(same(grad, whole) for grad in grads):
            if any(grad.shape != whole.shape for grad in grads) or not same(_total(grads), whole):
                raise Mismatch(name)
            finding.partial_parameters.add(name)
    return finding


def _total(grads: list[Tensor]) -> Tensor:
    return torch.stack(grads).sum(0)


def _require_sum(name: str, whole: Tensor, grads: list[Tensor], cut: Cut, dim: int, size: int) -> None:
    """The ranks' gradients, each put back where its slice came from, must add up to the whole one."""
    total = torch.zeros_like(whole)
    for rank, grad in enumerate(grads):
        total.index_add_(dim, cut.indices(whole.shape[dim], rank, size), grad)
    if not same(total, whole):
        raise Mismatch(name)


def _partial_features(name: str, whole: Tensor, grads: list[Tensor]) -> Tensor:
    """The features of a whole output whose gradient is the sum over the ranks; the others must be complete."""
    if any(grad.shape != whole.shape for grad in grads):
        raise Mismatch(name)
    limit = TOLERANCE * whole.abs().max()
    complete = torch.stack([_error(grad, whole) for grad in grads]).amax(0) <= limit
    summed = _error(_total(grads), whole) <= limit
    if not bool((complete | summed).all()):
        raise Mismatch(name)
    return ~complete


def _error(x: Tensor, expected: Tensor) -> Tensor:
    """The largest error of each feature."""
    return (x - expected).abs().flatten(0, -2).amax(0)


def _forward(
    weightless: WeightlessCopy, recorder: Recorder, inputs: Inputs, *, gradients: bool = True
) -> tuple[list[Tensor], Tensor | None]:
    """The model's floating-point outputs, and the first floating-point input, which gets a gradient."""
    args, kwargs = _fresh(inputs.args), _fresh(dict(inputs.kwargs))
    leaf = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point()), None)
    if leaf is not None:
        leaf.requires_grad_()
        # The model gets a copy, which its code may change in place.
        args = tuple(x.clone() if x is leaf else x for x in args)
        kwargs = {key: x.clone() if x is leaf else x for key, x in kwargs.items()}
    weightless.recorder = recorder
    try:
        fork = torch.random.fork_rng(devices=[])
        with torch.set_grad_enabled(gradients), _SomeHeads(), fork, weightless.chunks.shortened():
            torch.default_generator.manual_seed(0)  # the same numbers for every replay; the caller's are left alone
            output = weightless.model.get_submodule(inputs.called)(*args, **kwargs)
    finally:
        weightless.recorder = Idle()
    return [x for x in tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point()], leaf


class _SomeHeads(TorchFunctionMode):
    """Refuses attention without heads, where torch 2.11 divides by their number and the process ends."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is nn.functional.scaled_dot_product_attention and any(0 in x.shape for x in args[:3]):
            raise Mismatch("attention without heads")
        return func(*args, **(kwargs or {}))


def _fresh(values: Any) -> Any:
    """The same arguments, so that code that changes them in place does so on a copy."""
    if isinstance(values, Tensor):
        return values.clone()
    if isinstance(values, dict):
        return {k: _fresh(v) for k, v in values.items()}
    if isinstance(values, (tuple, list)):
        return type(values)(_fresh(v) for v in values)
    return values


def _backward(outputs: list[Tensor], grads: list[Tensor | None], *, retain: bool) -> None:
    pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad]
    if pairs:
        torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs], retain_graph=retain)


def _clear_grads(model: nn.Module) -> None:
    for param in model.parameters():
        param.grad = None


def _param_grads(weightless: WeightlessCopy) -> dict[str, Tensor]:
    """Gradients by copied name, of what is not a stub's."""
    return {
        f"{owner}.{name}" if owner else name: param.grad
        for owner, module in weightless.model.named_modules()
        if owner not in weightless.stubs
        for name, param in module._parameters.items()
        if param is not None and param.grad is not None
    }
