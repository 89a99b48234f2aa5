"""What attention and other parts of a block are answered while it is replayed on a part of the sequence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from shardwright.distributed.models.attention import attention_kernel
from shardwright.distributed.replay.pointwise import copied, handed_over
from shardwright.distributed.replay.record import CODE_ERRORS, same
from shardwright.distributed.runtime import collectives as c
from shardwright.distributed.runtime.context.attention import CAUSAL_WITHOUT_MASK, attend_rows
from shardwright.distributed.runtime.context.heads import attend_some_heads
from shardwright.distributed.runtime.context.parts import Split
from shardwright.distributed.runtime.context.places import (
    RESULT,
    Place,
    Places,
    argument_names,
    mapped,
    mapped_arguments,
)
from shardwright.distributed.runtime.context.reach import reach_of, window_of
from shardwright.distributed.runtime.regions import SEQUENCE_DIM

if TYPE_CHECKING:
    from shardwright.distributed.replay.context_parts import BlockReplay

RANKS = 2


class Unsplit(Exception):
    """A block, or a child of one, cannot run on a part of the sequence; the message says why."""


@dataclass
class Asked:
    """One call of an attention function on the whole sequence."""

    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor


def split_of(rank: int, length: int) -> Split:
    """How a sequence is dealt out in the replay."""
    return Split.even(c.Group("replay", RANKS, rank), SEQUENCE_DIM, length)


@dataclass(frozen=True)
class AttentionFinding:
    """How an attention module asks.

    Attributes:
        own_keys: whether its keys are of the part, too.
        heads: of the queries.
        key_heads: of the keys and values.
        key_size: of one head of the keys; ``value_size`` of the values.
        not_by_heads: why it cannot attend with some of the heads; empty where it can.
        all_keys: whether it computes something else without the keys that no query of a rank looks at.
        window: how many positions a query looks at, as far as the function is told; its own among them.
    """

    own_keys: bool
    heads: int
    key_heads: int
    key_size: int
    value_size: int
    not_by_heads: str = field(compare=False)
    all_keys: bool = field(compare=False, default=False)
    window: int | None = field(compare=False, default=None)

    def and_also(self, other: AttentionFinding) -> AttentionFinding:
        """What holds where both do."""
        return replace(
            self,
            not_by_heads=self.not_by_heads or other.not_by_heads,
            all_keys=self.all_keys or other.all_keys,
            window=self.window if self.window == other.window else None,
        )


class WholeAttention:
    """Notes what an attention module asks on the whole sequence."""

    def __init__(self, replay: BlockReplay, name: str) -> None:
        self.replay, self.name = replay, name

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, kwargs: Any) -> Any:
        kernel = attention_kernel(module, self.replay.kernels[self.name])
        assert kernel is not None
        before = copied(query), copied(key), copied(value)
        out, weights = kernel(module, query, key, value, mask, **kwargs)
        self.replay.asked.setdefault(self.name, []).append(Asked(*before, out=copied(out)))
        return out, weights


class PartAttention:
    """Answers an attention module with a rank's rows."""

    def __init__(self, replay: BlockReplay, name: str, rank: int) -> None:
        self.replay, self.name, self.rank = replay, name, rank
        self.found: AttentionFinding | None = None
        self._calls = iter(replay.asked.get(name, []))

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, kwargs: Any) -> Any:
        asked, replay = next(self._calls, None), self.replay
        if asked is None:
            raise Unsplit("attention is asked more often on a part of the sequence")
        rows = Place(2)
        if not same(query, replay.part(asked.query, rows, self.rank)):
            raise Unsplit("its queries are not those of the part")
        own = key.shape[2] != asked.key.shape[2]
        for given, whole in ((key, asked.key), (value, asked.value)):
            if not same(given, replay.part(whole, rows, self.rank) if own else whole):
                raise Unsplit("its keys and values are neither those of the part nor all")
        if self.found is not None and self.found.own_keys != own:
            raise Unsplit("its keys are of the part in one call, and all of them in another")
        name = replay.kernels[self.name]
        kernel, split = attention_kernel(module, name), split_of(self.rank, replay.length).at(2)
        assert kernel is not None
        out, weights = attend_rows(kernel, name, module, query, asked.key, asked.value, mask, kwargs, split)
        if not alike(out, replay.part(asked.out, Place(1), self.rank)):
            raise Unsplit("its attention has other rows when it is asked for a part")
        found = AttentionFinding(
            own,
            heads=asked.query.shape[1],
            key_heads=asked.key.shape[1],
            key_size=asked.key.shape[-1],
            value_size=asked.value.shape[-1],
            not_by_heads=self._not_by_heads(module, asked, mask, kwargs, own=own),
            all_keys=own and self._needs_all_keys(module, query, asked, mask, kwargs, (out, weights)),
            window=window_of(kwargs),
        )
        self.found = found if self.found is None else self.found.and_also(found)
        return out, weights

    def _needs_all_keys(
        self, module: nn.Module, query: Tensor, asked: Asked, mask: Any, kwargs: Any, expected: tuple[Tensor, Any]
    ) -> bool:
        """Whether the result is another one without the keys that the queries of this rank do not look at."""
        name, split = self.replay.kernels[self.name], split_of(self.rank, self.replay.length).at(2)
        reach, kernel = reach_of(mask, kwargs, split), attention_kernel(module, name)
        if reach is None:  # a call may have another mask; what is known without one is torch's kernel
            return name != CAUSAL_WITHOUT_MASK
        assert kernel is not None
        keys = reach[self.rank]
        key, value = (x[:, :, slice(*keys)] for x in (asked.key, asked.value))
        try:
            found = attend_rows(kernel, name, module, query, key, value, mask, kwargs, split, keys)
        except CODE_ERRORS:
            return True
        return not alike(found, expected)

    def _not_by_heads(self, module: nn.Module, asked: Asked, mask: Any, kwargs: Any, *, own: bool) -> str:
        name, heads = self.replay.kernels[self.name], asked.query.shape[1]
        if not own:
            return "its keys are of all positions already"
        if name != CAUSAL_WITHOUT_MASK:
            return f"its kernel is {name}, which hands out weights for every pair of positions"
        kernel = attention_kernel(module, name)
        assert kernel is not None
        groups = heads // asked.key.shape[1]
        if heads % RANKS or heads % asked.key.shape[1]:
            return f"it has {heads} heads"
        queries = asked.query.chunk(RANKS, 1)[self.rank]
        keys, values = (x.repeat_interleave(groups, 1).chunk(RANKS, 1)[self.rank] for x in (asked.key, asked.value))
        try:
            out = attend_some_heads(kernel, module, queries, keys, values, mask, kwargs, heads, self.rank)
        except CODE_ERRORS as error:
            return f"its kernel does not run on some of its heads ({type(error).__name__})"
        if not alike(out, asked.out.chunk(RANKS, 2)[self.rank]):
            return "its kernel computes something else on some of its heads"
        return ""


class AnsweredRegion:
    """Answers a child with the part of what it gave on the whole sequence."""

    def __init__(self, replay: BlockReplay, name: str, rank: int) -> None:
        self.replay, self.name, self.rank = replay, name, rank
        self.used = False
        self.elements: dict[str, int] = {}  # of an argument that has to be gathered, for each position
        self.arguments: dict[str, Place] = {}
        self.results: dict[str, Place] = {}
        self._calls = iter(replay.calls[name])

    def places(self) -> Places:
        return Places(tuple(sorted(self.arguments.items())), tuple(sorted(self.results.items())))

    @contextmanager
    def answering(self, module: nn.Module) -> Iterator[None]:
        own = module.__dict__.get("forward")

        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._answer(module, args, kwargs)

        module.__dict__["forward"] = forward
        try:
            yield
        finally:
            del module.__dict__["forward"]
            if own is not None:
                module.__dict__["forward"] = own

    def _answer(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call, self.used = next(self._calls, None), True
        if handed_over(argument_names(module), args, kwargs):
            raise Unsplit("a part of it that sees the whole sequence takes tensors of other blocks from a dict")
        if call is None:
            raise Unsplit("a part of it is called more often on a part of the sequence")
        whole = _leaves(module, call.args, call.kwargs)
        given = _leaves(module, args, kwargs)
        if whole.keys() != given.keys():
            raise Unsplit("a part of it is called with other arguments on a part of the sequence")
        for path, x in given.items():
            if same(x, whole[path]):
                continue
            place = self.replay.place(whole[path])
            if place is None or not same(x, self.replay.part(whole[path], place, self.rank)):
                raise Unsplit("a part of it is given neither the whole nor the part of the sequence")
            self.arguments[path] = place
            if x.is_floating_point() and all(x is not entered for entered in self.replay.entered):
                self.elements[path] = whole[path].numel() // (self.replay.batch * self.replay.length)

        def part(path: str, x: Tensor) -> Tensor:
            place = self.replay.place(x)
            if place is None:
                return copied(x)
            self.results[path] = place
            return copied(self.replay.part(x, place, self.rank))

        return mapped(call.output, RESULT, part)


def alike(x: Any, expected: Any) -> bool:
    """Whether two results are equal, but for rounding; what is not a number must be so in both."""
    if isinstance(expected, Tensor):
        if not isinstance(x, Tensor) or x.shape != expected.shape:
            return False
        gone = expected.isnan() if expected.is_floating_point() else None
        if gone is not None and bool(gone.any()):
            return bool((x.isnan() == gone).all()) and same(x.nan_to_num(), expected.nan_to_num())
        return same(x, expected)
    if isinstance(expected, dict):
        return isinstance(x, dict) and x.keys() == expected.keys() and all(alike(x[k], expected[k]) for k in expected)
    if isinstance(expected, (tuple, list)):
        same_form = isinstance(x, (tuple, list)) and len(x) == len(expected)
        return same_form and all(map(alike, x, expected))
    return True


def _leaves(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    mapped_arguments(argument_names(module), args, kwargs, lambda path, x: found.setdefault(path, x))
    return found
