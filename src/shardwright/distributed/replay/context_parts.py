"""Which blocks can run on a part of the sequence, and which of their children must see all of it.

Found by running them. Every block runs again on the parts that two ranks would have, in the copy without weights, whose
layers compute known functions of each position (:mod:`.pointwise`). Its children run with it: an MLP that works on each
position, a router and its experts, and attention that asks transformers' table for its function, which is answered by
the rows that context parallelism computes (:func:`attend_rows`, the one that runs later). A child that mixes positions
otherwise is answered as if it had seen the whole sequence. The result must be the part of what the block gave on all of
it.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Container, Iterable, Iterator, Mapping, MutableMapping, MutableSequence, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from typing import Any

from torch import Tensor, nn

from shardwright.distributed.models.attention import attention_kernel, attention_name, register_context_attention
from shardwright.distributed.replay.context_answers import (
    RANKS,
    AnsweredRegion,
    Asked,
    AttentionFinding,
    PartAttention,
    Unsplit,
    WholeAttention,
    alike,
    split_of,
)
from shardwright.distributed.replay.context_long import check_long
from shardwright.distributed.replay.module_calls import ModuleCall
from shardwright.distributed.replay.pointwise import copied, handed_over, pointwise, with_items
from shardwright.distributed.replay.record import CODE_ERRORS
from shardwright.distributed.replay.weightless import WeightlessCopy
from shardwright.distributed.runtime.context.attention import HOLDER, KERNELS, KernelName
from shardwright.distributed.runtime.context.places import (
    RESULT,
    Place,
    Places,
    argument_names,
    mapped,
    mapped_arguments,
)
from shardwright.distributed.runtime.local_sizes import LocalSizes
from shardwright.distributed.runtime.regions import SEQUENCE_DIM, first_argument
from shardwright.errors import UnsupportedError

FAILURES = (*CODE_ERRORS, UnsupportedError)


@dataclass
class BlockFinding:
    """How a block runs on a part of the sequence.

    Attributes:
        stream: the name of the argument that the length is read from.
        places: what of its arguments and results is split.
        regions: the children that see the whole sequence -> what of theirs comes and goes in parts.
        attention: the modules whose attention asks the table -> how.
        recorded: the modules whose results the model hands out beside its own -> what of them is split.
        reasons: child -> why it sees the whole sequence.
        gathered: child that does -> elements that are gathered for it, for each position.
    """

    stream: str
    places: Places
    regions: dict[str, Places] = field(default_factory=dict)
    attention: dict[str, AttentionFinding] = field(default_factory=dict)
    recorded: dict[str, Places] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    gathered: dict[str, int] = field(default_factory=dict)


class BlockReplay:
    """One block and the calls of it and its children that a pointwise run made.

    Args:
        kernels: name of a module in the block -> the attention function that the real model uses there.
        recorded: modules of the copy whose results the model hands out beside its own.
        length: how many positions the model was given; 0 where that is not known.
        experts: modules of the copy that are called as experts are, for each token by itself.

    Raises:
        Unsplit: the block is not called with ``[batch, positions, features]``.
    """

    def __init__(
        self,
        weightless: WeightlessCopy,
        block: str,
        calls: Mapping[str, list[ModuleCall]],
        kernels: Mapping[str, str],
        recorded: Iterable[str] = (),
        experts: Container[str] = (),
        length: int = 0,
    ) -> None:
        self.weightless, self.block, self.calls, self.kernels = weightless, block, calls, kernels
        self.module = weightless.model.get_submodule(block)
        self.call = calls[block][0]
        self.stream = first_argument(self.module)
        stream = self.call.args[0] if self.call.args else self.call.kwargs.get(self.stream)
        for value in (*self.call.args, *self.call.kwargs.values()):
            known = type(value) in (dict, list) or isinstance(value, UserDict)
            if isinstance(value, (MutableMapping, MutableSequence)) and not known and len(value):
                raise Unsplit(f"it is handed a {type(value).__name__}, by which blocks may hand each other tensors")
        form: tuple[int, ...] = tuple(stream.shape) if isinstance(stream, Tensor) else ()
        # Streams of several copies have one dim more: [batch, positions, copies, features], or the copies first.
        dims = [n for n, size in enumerate(form) if n and size == length] if len(form) == 4 else [SEQUENCE_DIM]
        if not isinstance(stream, Tensor) or len(form) not in (3, 4) or len(dims) != 1 or form[dims[0]] < RANKS:
            found = form if form else type(stream).__name__
            raise Unsplit(f"its input has the form {found}, not [batch, positions, features]")
        self.batch, self.length = stream.shape[dims[0] - 1], stream.shape[dims[0]]
        self.experts = experts
        self.recorded = [name for name in recorded if name.startswith(f"{block}.")]
        self.results: dict[str, Any] = {}
        self.entered: list[Tensor] = []  # parts of arguments of the module that runs, of which the whole is known
        self.asked: dict[str, list[Asked]] = {}
        self.attending = {name: part for name, part in self.module.named_modules(prefix=block) if self._can_ask(name)}
        self._run_whole()

    def _can_ask(self, name: str) -> bool:
        module = self.weightless.model.get_submodule(name)
        kernel = self.kernels.get(name)
        return kernel in KERNELS and attention_name(module) is not None and attention_kernel(module, kernel) is not None

    def children(self) -> list[str]:
        return [path for child, _ in self.module.named_children() if (path := f"{self.block}.{child}") in self.calls]

    def _run_whole(self) -> None:
        """Once more on all positions, to note what attention is asked."""
        args, kwargs = copied(self.call.args), copied(self.call.kwargs)
        try:
            with (
                self._asking(lambda name: WholeAttention(self, name)),
                pointwise(self.weightless),
                self._noting(self.results),
            ):
                result = self.module(*args, **kwargs)
        except FAILURES as error:
            raise Unsplit(f"it does not run again by itself ({_first_line(error)})") from error
        if not alike(result, self.call.output):
            raise Unsplit("it does not compute the same when it runs again")
        if not alike((args, kwargs), (self.call.args, self.call.kwargs)):
            raise Unsplit("it changes what it is given")

    @contextmanager
    def _asking(self, holder: Any) -> Iterator[None]:
        """Modules of the block find our function in the table, which finds ``holder(name)``."""
        register_context_attention()
        with ExitStack() as stack:
            for name, module in self.attending.items():
                module.__dict__[HOLDER] = holder(name)
                stack.callback(module.__dict__.pop, HOLDER)
                values = {"config._attn_implementation": KernelName(self.kernels[name])}
                stack.enter_context(LocalSizes(module, values).on(module))
            yield

    @contextmanager
    def _noting(self, results: dict[str, Any]) -> Iterator[None]:
        """Note what the recorded modules give when they are first called."""

        def note(name: str, module: nn.Module, args: Any, output: Any) -> None:
            results.setdefault(name, copied(output))

        with ExitStack() as stack:
            for name in self.recorded:
                module = self.weightless.model.get_submodule(name)
                stack.callback(module.register_forward_hook(partial(note, name)).remove)
            yield

    def find(self, known: Mapping[str, str] | None = None) -> BlockFinding:
        """Try the children by themselves, then the block with them.

        Args:
            known: children that were seen to need the whole sequence -> why, without the block's name. None: nothing
                was tried yet, and what keeps positions apart is tried in long sequences, too.

        Raises:
            Unsplit: the block must see the whole sequence.
        """
        reasons = {f"{self.block}.{child}": why for child, why in (known or {}).items()}
        long = known is None
        for child in self.children():
            if child in reasons:
                continue
            if (unseen := self._unseen(child)) is not None:
                reasons[child] = f"the code of {unseen} was not run, its parameters are too large"
                continue
            try:
                found = self._try(child, self.calls[child][0], [])
                if long:
                    self._check_long(child, found)
            except Unsplit as error:
                reasons[child] = str(error)
            except FAILURES as error:
                reasons[child] = _first_line(error)
        outside = [name for name in self.weightless.stubs if not any(f"{name}.".startswith(f"{c}.") for c in reasons)]
        for name in outside:
            if name.startswith(f"{self.block}.") and self._unseen(name) is not None:
                raise Unsplit(f"the code of {self._unseen(name)} was not run, its parameters are too large")
        try:
            finding = self._try(self.block, self.call, list(reasons))
        except (Unsplit, *FAILURES):
            everyone = [child for child in self.children() if _has_parameters(self.weightless.model, child)]
            rest = [child for child in everyone if child not in reasons]
            if not rest:
                raise
            finding = self._try(self.block, self.call, [*reasons, *rest])
            reasons |= dict.fromkeys(rest, "the block works so")
        finding.reasons = reasons
        if long and not finding.regions:
            self._check_long(self.block, finding)
        return finding

    def _check_long(self, name: str, finding: BlockFinding) -> None:
        """What has no attention of which it is known how it sees all positions keeps them apart in long sequences."""
        call = self.calls[name][0]
        if not finding.attention and not call.left:
            names = argument_names(self.weightless.model.get_submodule(name))
            check_long(self, name, call, finding.places, names)

    def _unseen(self, child: str) -> str | None:
        """A module in ``child`` whose code the copy does not run. Experts work on each token."""
        for name, stub in self.weightless.stubs.items():
            if stub.kind == "opaque" and f"{name}.".startswith(f"{child}.") and name not in self.experts:
                return type(self.weightless.model.get_submodule(name)).__name__
        return None

    def _try(self, name: str, call: ModuleCall, regions: Sequence[str]) -> BlockFinding:
        """Run a module on every rank's part, with the arguments cut that can be; fewer of them where that fails."""
        failure: Exception | None = None
        for cut in _ways_to_cut(self._places(name, call)):
            try:
                findings = [self._on_part(name, call, cut, regions, rank) for rank in range(RANKS)]
            except (Unsplit, *FAILURES) as error:
                failure = failure or error
                continue
            if all(finding == findings[0] for finding in findings):
                others = [finding.attention for finding in findings[1:]]
                attention = {
                    path: reduce(AttentionFinding.and_also, (other[path] for other in others), found)
                    for path, found in findings[0].attention.items()
                }
                return replace(findings[0], attention=attention)
            failure = failure or Unsplit("its ranks differ")
        assert failure is not None
        raise failure if isinstance(failure, Unsplit) else Unsplit(_first_line(failure))

    def _places(self, name: str, call: ModuleCall) -> dict[str, Place]:
        """The arguments that may have an item for every position."""
        found: dict[str, Place] = {}
        names = argument_names(self.weightless.model.get_submodule(name))

        def look(path: str, x: Tensor) -> Tensor:
            if (place := self.place(x)) is not None:
                found[path] = place
            return x

        mapped_arguments(names, call.args, call.kwargs, look)
        return found

    def place(self, x: Tensor) -> Place | None:
        dims = [dim for dim, size in enumerate(x.shape) if size == self.length]
        if len(dims) == 1:
            return Place(dims[0])
        merged = not dims and x.ndim > 1 and x.shape[0] == self.batch * self.length
        return Place(0, merged=True) if merged else None

    def part(self, x: Tensor, place: Place, rank: int) -> Tensor:
        split = place.split(split_of(rank, self.length), self.batch)
        start, end = split.mine
        if place.merged:
            return x.unflatten(0, (self.batch, self.length))[:, start:end].flatten(0, 1)
        return x.narrow(place.dim, start, end - start)

    def _handed_parts(self, value: Any, rank: int) -> Any:
        """``value`` with a rank's parts in the dicts by which blocks hand each other tensors."""

        def cut(x: Any) -> Any:
            if type(x) is tuple:
                return tuple(map(cut, x))
            place = self.place(x) if isinstance(x, Tensor) else None
            if place is None:
                raise Unsplit("blocks hand each other something else than tensors with an item for every position")
            return copied(self.part(x, place, rank))

        if isinstance(value, UserDict):
            return with_items(value, cut)
        if type(value) is tuple:
            return tuple(self._handed_parts(item, rank) for item in value)
        return {key: self._handed_parts(x, rank) for key, x in value.items()} if type(value) is dict else value

    def _on_part(
        self, name: str, call: ModuleCall, cut: Mapping[str, Place], regions: Sequence[str], rank: int
    ) -> BlockFinding:
        module = self.weightless.model.get_submodule(name)
        names = argument_names(module)
        entered: dict[str, Place] = {}
        self.entered = []

        def enter(path: str, x: Tensor) -> Tensor:
            place = cut.get(path)
            if place is None:
                return copied(x)
            entered[path] = place
            mine = copied(self.part(x, place, rank))
            if path != self.stream:
                self.entered.append(mine)
            return mine

        args, kwargs = mapped_arguments(names, call.args, call.kwargs, enter)
        args, kwargs = self._handed_parts((args, kwargs), rank)
        kept = copied((args, kwargs))
        answers = {region: AnsweredRegion(self, region, rank) for region in regions}
        holders: dict[str, PartAttention] = {}
        noted: dict[str, Any] = {}

        def holder(path: str) -> Any:
            return holders.setdefault(path, PartAttention(self, path, rank))

        with ExitStack() as stack:
            for region, answer in answers.items():
                stack.enter_context(answer.answering(self.weightless.model.get_submodule(region)))
            stack.enter_context(self._asking(holder))
            stack.enter_context(pointwise(self.weightless))
            stack.enter_context(self._noting(noted))
            result = module(*args, **kwargs)
        if not alike((args, kwargs), kept):
            raise Unsplit("it changes what it is given")
        for path, left in handed_over(names, args, kwargs).items():
            if not alike(left.data, self._handed_parts(call.left[path], rank).data):
                raise Unsplit(f"what it leaves in {path} for other blocks is not the part of the sequence")
        return BlockFinding(
            names[0] if names else "",
            Places(tuple(sorted(entered.items())), _split_results(self, call.output, result, rank)),
            {region: answer.places() for region, answer in answers.items() if answer.used},
            {path: part.found for path, part in holders.items() if part.found is not None},
            {path: Places((), _split_results(self, self.results[path], x, rank)) for path, x in noted.items()},
            gathered={region: sum(answer.elements.values()) for region, answer in answers.items() if answer.used},
        )


def _ways_to_cut(places: Mapping[str, Place]) -> Iterator[dict[str, Place]]:
    """All that may be cut; all but what looks like a mask; the first alone."""
    tried: list[dict[str, Place]] = []
    first = dict(list(places.items())[:1])
    without_masks = {path: place for path, place in places.items() if "mask" not in path}
    for way in (dict(places), without_masks, first):
        if way and way not in tried:
            tried.append(way)
            yield way


def _split_results(replay: BlockReplay, whole: Any, part: Any, rank: int) -> tuple[tuple[str, Place], ...]:
    """The places of parts in a result, of which every tensor must be the whole one or this rank's part of it."""
    results: dict[str, Place] = {}
    expected: dict[str, Tensor] = {}
    got: dict[str, Tensor] = {}
    mapped(whole, RESULT, lambda path, x: expected.setdefault(path, x))
    mapped(part, RESULT, lambda path, x: got.setdefault(path, x))
    if expected.keys() != got.keys() or not got:
        raise Unsplit("it returns something else on a part of the sequence")
    for path, x in got.items():
        if alike(x, expected[path]):
            continue
        places = [Place(dim) for dim, size in enumerate(expected[path].shape) if size == replay.length]
        if not places and (merged := replay.place(expected[path])) is not None:
            places = [merged]
        found = next((place for place in places if alike(x, replay.part(expected[path], place, rank))), None)
        if found is None:
            raise Unsplit("it mixes positions")
        results[path] = found
    return tuple(sorted(results.items()))


def _has_parameters(model: nn.Module, name: str) -> bool:
    return any(True for _ in model.get_submodule(name).parameters())


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0][:200]
