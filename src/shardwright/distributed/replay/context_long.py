"""Whether a module that works on each position does so in long sequences, and in training, too.

Experts that drop tokens when they are full, and attention of fixed windows, show what they do to positions only where
there are many. So a module that was seen to keep positions apart is run once more, on its arguments repeated along the
sequence: few different tokens, of which an expert gets many.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from math import isqrt
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from shardwright._torch import DropoutNd
from shardwright.distributed.replay.context_answers import RANKS, Unsplit, alike, split_of
from shardwright.distributed.replay.module_calls import ModuleCall
from shardwright.distributed.replay.pointwise import copied, pointwise
from shardwright.distributed.replay.record import CODE_ERRORS
from shardwright.distributed.runtime.context.places import RESULT, Place, Places, mapped, mapped_arguments
from shardwright.distributed.runtime.implicit import tensors_in

if TYPE_CHECKING:
    from shardwright.distributed.replay.context_parts import BlockReplay

LENGTHS = (4099, 1031, 257, 67)  # positions: no multiples of the ranks, nor of a window
ELEMENTS = 1 << 24  # of the largest tensor, about


def check_long(replay: BlockReplay, name: str, call: ModuleCall, places: Places, argument_names: list[str]) -> None:
    """Run a module on a long sequence and on the parts of it.

    Args:
        places: what of its arguments and results has an item for every position.

    Raises:
        Unsplit: the results for a part are not the part of the results.
    """
    module = replay.weightless.model.get_submodule(name)
    widths = [stub.width_out for path, stub in replay.weightless.stubs.items() if path.startswith(f"{name}.")]
    most = ELEMENTS // (replay.batch * max([*widths, 1]))
    if any(tuple(x.shape).count(replay.length) > 1 for x in tensors_in((call.args, call.kwargs))):
        most = min(most, isqrt(ELEMENTS // replay.batch))  # a mask has a number for each pair of positions
    arguments, results = dict(places.arguments), dict(places.results)
    for training in (True, False):
        with _as_in(module, training=training):
            found = _longest_run(replay, module, call, argument_names, most)
            if found is None:
                return  # it is made for few positions
            length, args, kwargs, whole = found
            for rank in range(RANKS):

                def part(path: str, x: Tensor, rank: int = rank, length: int = length) -> Tensor:
                    return _part(replay, x, arguments[path], rank, length) if path in arguments else x

                some = _run(replay, module, *mapped_arguments(argument_names, args, kwargs, part))
                _compare(replay, whole, some, results, rank, length)


def _longest_run(
    replay: BlockReplay, module: nn.Module, call: ModuleCall, argument_names: list[str], most: int
) -> tuple[int, Any, Any, Any] | None:
    """The length, arguments and result of a run on as many positions as the module takes; None where it takes few."""
    for length in LENGTHS:
        if not 2 * replay.length < length <= most:
            continue
        longer = partial(_repeated, replay, length)
        args, kwargs = mapped_arguments(argument_names, call.args, call.kwargs, longer)
        try:
            return length, args, kwargs, _run(replay, module, args, kwargs)
        except CODE_ERRORS:
            continue
    return None


def _run(replay: BlockReplay, module: nn.Module, args: Any, kwargs: Any) -> Any:
    with pointwise(replay.weightless):
        return module(*copied(args), **copied(kwargs))


def _compare(replay: BlockReplay, whole: Any, some: Any, results: Mapping[str, Place], rank: int, length: int) -> None:
    expected: dict[str, Tensor] = {}
    mapped(whole, RESULT, lambda path, x: expected.setdefault(path, x))

    def compared(path: str, x: Tensor) -> Tensor:
        place = results.get(path)
        mine = expected[path] if place is None else _part(replay, expected[path], place, rank, length)
        if not alike(x, mine):
            raise Unsplit(f"it mixes positions where there are many ({length} were tried)")
        return x

    mapped(some, RESULT, compared)


@contextmanager
def _as_in(module: nn.Module, *, training: bool) -> Iterator[None]:
    """``module`` is in training inside, with nothing dropped, or in evaluation. It is as it was afterwards."""
    before = {part: dict(part.__dict__) for part in module.modules()}
    try:
        for part in before:
            part.training = training and not isinstance(part, DropoutNd)
        yield
    finally:
        for part, state in before.items():
            part.__dict__.clear()
            part.__dict__.update(state)


def _repeated(replay: BlockReplay, length: int, path: str, x: Tensor) -> Tensor:
    """``x`` with ``length`` positions in every dim that has them: a mask has two."""
    times, place = -(-length // replay.length), replay.place(x)
    if place is not None and place.merged:
        rows = x.unflatten(0, (replay.batch, replay.length))
        return rows.repeat(1, times, *[1] * (x.ndim - 1))[:, :length].flatten(0, 1)
    dims = [size == replay.length for size in x.shape]
    longer = x.repeat([times if has_positions else 1 for has_positions in dims])
    return longer[tuple(slice(length if has_positions else None) for has_positions in dims)]


def _part(replay: BlockReplay, x: Tensor, place: Place, rank: int, length: int) -> Tensor:
    start, end = split_of(rank, length).mine
    if place.merged:
        return x.unflatten(0, (replay.batch, length))[:, start:end].flatten(0, 1)
    return x.narrow(place.dim, start, end - start)
