"""Experts that are modules of their own in a list, on ranks of their own.

The code that calls them one after another says what each is called with (:mod:`.expert_loop`), their weights come to
the ranks that compute them (:mod:`.expert_delivery`), and the tokens travel there and back as those of stacked experts
do. In a layer, forward: one all-gather of counts, one all-to-all of weights, one of every tensor that experts are
called with, one of results. Backward: the transposes of all but the first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shardwright._torch import begin_forward, end_forward, state_of, tree_flatten, tree_leaves, tree_unflatten
from shardwright.distributed.runtime import collectives as c
from shardwright.distributed.runtime.expert_calls import Called, ExpertCall
from shardwright.distributed.runtime.expert_delivery import Delivery, Weight, delivered
from shardwright.distributed.runtime.expert_exchange import Ranks
from shardwright.distributed.runtime.expert_loop import Loop, run_together
from shardwright.distributed.runtime.forward import (
    Around,
    Forward,
    all_local_parameters,
    all_parameters_as,
    original_class,
)
from shardwright.distributed.runtime.gradients import with_others_in_graph
from shardwright.errors import UnsupportedError

_CALLED, _TRAINED = 1, 2
_DTYPES = (
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)


@dataclass(frozen=True)
class Traffic:
    """How many rows go where in one call of a layer. All ranks know all of it.

    Attributes:
        counts: ``[rank][expert]``: the rows that a rank has for an expert.
        called: for each expert, whether the code of any rank calls it, be it without tokens.
        trained: for each expert, whether the code of any rank calls it and wants gradients.
        dtypes: of the tensors that experts are called with.
        with_gradient: whether those of any rank want gradients.
    """

    counts: list[list[int]]
    called: list[bool]
    trained: list[bool]
    dtypes: list[torch.dtype]
    with_gradient: bool

    @classmethod
    def of(
        cls, counts: list[int], calls: list[ExpertCall], tensors: Sequence[Tensor | None], group: c.Group, on: Tensor
    ) -> Traffic:
        """From what this rank has; a collective, for which the host waits.

        Args:
            counts: of the rows that this rank has for each expert.
            tensors: None for those that this rank, whose code calls no expert, does not know.
            on: a tensor on the device.
        """
        uses = [0] * len(counts)
        for call in calls:
            uses[call.expert] = max(uses[call.expert], _TRAINED if call.with_gradient else _CALLED)
        codes = [0 if x is None else 1 + _DTYPES.index(x.dtype) for x in tensors]
        wants = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
        own = torch.tensor([[*counts, *uses, *codes, int(wants)]], device=on.device)
        everyone = c.all_gather(own, 0, group.size, group).tolist()
        count = len(counts)
        most = [max(column) for column in zip(*(row[count:] for row in everyone), strict=True)]
        dtypes = [_DTYPES[code - 1] if code else on.dtype for code in most[count:-1]]
        used = most[:count]
        return cls(
            counts=[row[:count] for row in everyone],
            called=[use >= _CALLED for use in used],
            trained=[use == _TRAINED for use in used],
            dtypes=dtypes,
            with_gradient=bool(most[-1]),
        )


class NotElsewhere(Around):
    """Around an expert of a list: it can run where its weights have been brought, and nowhere else."""

    def __call__(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if any(isinstance(param, DTensor) for param in module.parameters()):
            raise UnsupportedError(
                f"An expert ({original_class(module).__name__}) is called outside of the forward of the module around "
                "its list, or once more in backward, as torch.utils.checkpoint inside of that forward does. Its "
                "weights are spread over ranks, and are here in that forward only. Recompute whole blocks instead "
                "(activation_checkpointing: full), or leave ep out."
            )
        return forward(*args, **kwargs)


class ListedExchange(Around):
    """Around a module whose code calls experts that are modules of their own.

    Args:
        loop: where they are.
        called: what they are called with.
        shapes: of the parameters of an expert, by name.
        gradient_factor: what gradients of experts are multiplied by.
    """

    def __init__(
        self, loop: Loop, called: Called, shapes: Mapping[str, tuple[int, ...]], ranks: Ranks, gradient_factor: float
    ) -> None:
        self.loop, self.called, self.shapes = loop, called, dict(shapes)
        self.group, self.sharing = ranks.experts, ranks.sharing
        self.gradient_factor = gradient_factor

    @torch.compiler.disable  # how many rows come and go is only known when it runs
    def __call__(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        experts = self.loop.modules(module)
        first = next(x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.is_floating_point())
        state = state_of(experts[0])
        trained = torch.is_grad_enabled() and any(p.requires_grad for expert in experts for p in expert.parameters())
        token = begin_forward(state, experts[0], torch.zeros((), device=first.device, requires_grad=trained))
        slices = [all_local_parameters(expert) for expert in experts]
        ends: list[Tensor] = []
        forms: list[Tensor] = []

        def like(call: ExpertCall) -> Tensor:
            if not forms:
                forms.append(self._result(experts[0], slices[0], call.rows()))
            return forms[0].new_zeros(*call.lead, *forms[0].shape[1:])

        def answer(calls: list[ExpertCall]) -> list[Tensor]:
            results, end = self._answered(experts, slices, calls, first, token)
            ends.extend((*results, end))
            return results if calls else []

        output = run_together(module, self.loop, forward, args, kwargs, like, answer)
        leaves, spec = tree_flatten(output)
        place = next(n for n, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point())
        # Backward comes from here to all that was sent, used or not. FSDP2 wants a tensor of its own.
        leaves[place] = end_forward(state, experts[0], with_others_in_graph(leaves[place], ends).clone())
        return tree_unflatten(leaves, spec)

    def _result(self, expert: nn.Module, slices: dict[str, Tensor], rows: list[Tensor]) -> Tensor:
        """What an expert makes of no rows: the shape and the dtype of results, which depends on autocast, too."""
        weights = {name: slices[name].new_empty(()).expand(shape) for name, shape in self.shapes.items()}
        args, kwargs = self.called.form.arguments([x.detach()[:0] for x in rows])
        with torch.no_grad(), all_parameters_as(expert, weights):
            result: Tensor = expert(*args, **kwargs)
        return result

    def _answered(
        self,
        experts: list[nn.Module],
        slices: list[dict[str, Tensor]],
        calls: list[ExpertCall],
        first: Tensor,
        token: Tensor,
    ) -> tuple[list[Tensor], Tensor]:
        """The results of ``calls`` (no rows where there are none), and ``token``, which weights have come with."""
        order = sorted(range(len(calls)), key=lambda n: calls[n].expert)
        counts = [sum(call.count for call in calls if call.expert == n) for n in range(len(experts))]
        total = sum(counts)
        own = self._together([calls[n] for n in order])
        if self.sharing is not None:
            counts = _part(counts, *self.sharing.bounds(total))
            own = [None if x is None else c.scatter(x, 0, self.sharing) for x in own]
        traffic = Traffic.of(counts, calls, own, self.group, first)
        tensors = [
            first.new_zeros(0, *tail, dtype=dtype) if x is None else x
            for x, tail, dtype in zip(own, self.called.tails, traffic.dtypes, strict=True)
        ]
        if torch.is_grad_enabled() and traffic.with_gradient and not any(x.requires_grad for x in tensors):
            tensors[0] = tensors[0].detach().requires_grad_()  # the others' gradients travel through this rank
        weights, token = self._delivered(slices, traffic, token)
        results = self._exchanged(experts, slices, weights, traffic, tensors, token)
        if self.sharing is not None:
            results = c.gather(results, 0, total, self.sharing, partial_grad=False)
        found = [results] * max(len(calls), 1)
        for n, rows in zip(order, results.split([calls[n].count for n in order]) if calls else (), strict=True):
            found[n] = rows.reshape(*calls[n].lead, *rows.shape[1:]).clone()  # code may write into it
        return found, token

    def _together(self, calls: list[ExpertCall]) -> Sequence[Tensor | None]:
        """The tensors of all calls put together; None for each where there are no calls."""
        if not calls:
            return [None] * len(self.called.tails)
        if Called.by(calls) != self.called:
            raise UnsupportedError(
                f"Experts are called with other arguments than in a trial before the model was sharded: with "
                f"{Called.by(calls)}, and then with {self.called}. They cannot be computed on other ranks. Leave ep "
                "out."
            )
        return [torch.cat(parts) for parts in zip(*(call.rows() for call in calls), strict=True)]

    def _delivered(
        self, slices: list[dict[str, Tensor]], traffic: Traffic, token: Tensor
    ) -> tuple[dict[int, dict[str, Tensor]], Tensor]:
        """The weights of this rank's experts that anyone calls, by the place of the expert."""
        places = [(n, name) for n, called in enumerate(traffic.called) if called for name in self.shapes]
        if not places:
            return {}, token
        weights = tuple(Weight(n, self.shapes[name]) for n, name in places)
        delivery = Delivery(weights, len(slices), self.group, self.gradient_factor)
        own = [slices[n][name] if traffic.trained[n] else slices[n][name].detach() for n, name in places]
        token, whole = delivered(token, delivery, own)
        found: dict[int, dict[str, Tensor]] = {}
        for place, weight in zip(delivery.own(), whole, strict=True):
            expert, name = places[place]
            found.setdefault(expert, {})[name] = weight
        return found, token

    def _exchanged(
        self,
        experts: list[nn.Module],
        slices: list[dict[str, Tensor]],
        weights: dict[int, dict[str, Tensor]],
        traffic: Traffic,
        tensors: list[Tensor],
        token: Tensor,
    ) -> Tensor:
        """The results of ``tensors``, which are sorted by expert; every rank's experts are computed meanwhile."""
        start, end = self.group.bounds(len(experts))
        each = -(-len(experts) // self.group.size)
        going = [sum(traffic.counts[self.group.rank][n * each : (n + 1) * each]) for n in range(self.group.size)]
        coming = [counts[start:end] for counts in traffic.counts]
        sizes = [sum(counts) for counts in coming]
        arrived = [c.exchange(x, going, sizes, self.group) for x in tensors]
        by_rank = [x.split([rows for counts in coming for rows in counts]) for x in arrived]
        parts: list[Tensor] = [arrived[0]] * (len(sizes) * (end - start))
        for expert in range(start, end):
            places = range(expert - start, len(parts), end - start)
            inputs = [torch.cat([pieces[n] for n in places]) for pieces in by_rank]
            if (own := weights.get(expert)) is None:
                results = self._result(experts[expert], slices[expert], inputs)
            else:
                args, kwargs = self.called.form.arguments(inputs)
                with all_parameters_as(experts[expert], own):
                    results = experts[expert](*args, **kwargs)
            for n, piece in zip(places, results.split([len(by_rank[0][n]) for n in places]), strict=True):
                parts[n] = piece
        # Backward comes here on every rank, and from here to all that has travelled.
        together = with_others_in_graph(torch.cat(parts), [token, *arrived])
        return c.exchange(together, sizes, going, self.group)


def _part(counts: list[int], start: int, end: int) -> list[int]:
    """How many of the rows from ``start`` to ``end`` each expert has, where all together have ``counts``."""
    ends = [min(max(total, start), end) for total in accumulate(counts)]
    return [end - begin for begin, end in zip([start, *ends], ends, strict=False)]
