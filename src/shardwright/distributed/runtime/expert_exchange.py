"""Experts on ranks of their own: every token travels to the ranks of the experts that it was routed to, and back.

A rank sorts the choices of its tokens by expert and tells the others how many there are for each of their experts (one
small all-to-all). Then the tokens travel (a second), each rank computes its experts on what came, whatever
implementation of them the model uses, and the results travel back (a third), where they are weighted and summed. No
token is dropped. Backward is the transpose: gradients travel the same ways. The host waits for the device once, to
learn how many rows come and go.

Ranks that share tokens (tensor-parallel ones) send a part of them each, so that no token is computed twice.

The scheme is that of Megatron-LM's and torchtitan's dispatchers without capacity.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.functional import pad

from shardwright._torch import begin_forward, end_forward, is_unit, state_of
from shardwright.distributed.runtime import collectives as c
from shardwright.distributed.runtime.adapted import base_layer
from shardwright.distributed.runtime.expert_adapters import adapters_of
from shardwright.distributed.runtime.forward import Around, Forward, attributes_as, local_parameters, parameters_as
from shardwright.distributed.runtime.gradients import with_others_in_graph, with_scaled_gradient


class _ToRows(torch.autograd.Function):
    """The tokens of sorted choices: row ``i`` is the token of choice ``order[i]``; a token has ``choices`` of them."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, order: Tensor, choices: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.choices, ctx.count = choices, tokens.shape[0]
        return tokens[order // choices]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        # A sum over each token's choices in a fixed order; adding rows up by index would depend on chance on a GPU.
        return _FromRows.apply(grad, order, ctx.count, ctx.choices).sum(1), None, None


class _FromRows(torch.autograd.Function):
    """Rows of sorted choices back in their places: ``[tokens, choices, ...]``, zeros for choices without a row."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, count: int, choices: int) -> Tensor:
        ctx.save_for_backward(order)
        places = rows.new_zeros(count * choices, *rows.shape[1:])
        places[order] = rows
        return places.unflatten(0, (count, choices))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (order,) = ctx.saved_tensors
        return grad.flatten(0, 1)[order], None, None, None


@dataclass(frozen=True)
class Ranks:
    """Who exchanges what.

    Attributes:
        experts: the ranks among which experts are spread; the last may have fewer.
        sharing: the ranks that are called with the same tokens; None where no others are.
    """

    experts: c.Group
    sharing: c.Group | None

    @classmethod
    def of(cls, experts: DeviceMesh, sharing: DeviceMesh | None) -> Ranks:
        """From one-dimensional meshes."""
        alone = sharing is None or sharing.size() == 1
        return cls(c.Group.of(experts), None if sharing is None or alone else c.Group.of(sharing))


class ExpertExchange(Around):
    """Around a module that holds this rank's experts, or around the adapters on them.

    Args:
        experts: how many there are on all ranks.
        arguments: what the module's forward calls its arguments.
        parameters: the names, below the module, of the parameters that hold this rank's experts.
        gradient_factor: what their gradients are multiplied by. Every rank's gradient is a sum over the tokens that
            came to it, from all ranks.
    """

    def __init__(
        self,
        experts: int,
        arguments: tuple[str, ...],
        parameters: tuple[str, ...],
        ranks: Ranks,
        gradient_factor: float,
    ) -> None:
        self.experts, self.arguments = experts, arguments
        self.group, self.sharing = ranks.experts, ranks.sharing
        self.gradient_factor = gradient_factor
        self.owners = tuple(dict.fromkeys(name.rpartition(".")[0] for name in parameters))

    @torch.compiler.disable  # how many rows come and go is only known when it runs
    def __call__(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        values = {**dict(zip(self.arguments, args, strict=False)), **kwargs}
        first, *others = (values[name] for name in self.arguments)
        holder = base_layer(module)
        if holder is module or not is_unit(holder):
            return self._with_own(module, holder, forward, first, *others)
        # Adapters around experts change the experts' weights before FSDP2 would gather them.
        first = begin_forward(state_of(holder), holder, first)
        return end_forward(state_of(holder), holder, self._with_own(module, holder, forward, first, *others))

    def _with_own(self, module: nn.Module, holder: nn.Module, forward: Forward, *values: Any) -> Tensor:
        with ExitStack() as inside:
            for owner in map(module.get_submodule, self.owners):
                local = {
                    name: with_scaled_gradient(tensor, self.gradient_factor)
                    for name, tensor in local_parameters(owner).items()
                }
                inside.enter_context(parameters_as(owner, local))
            start, end = self.group.bounds(self.experts)
            inside.enter_context(attributes_as(holder, {"num_experts": end - start}))
            inside.enter_context(adapters_of(module, self.experts, start, end))
            return self.run(module, forward, *values)

    def run(self, module: nn.Module, forward: Forward, *values: Any) -> Tensor:
        """The module's result for the values of its arguments, with its parameters in place."""
        raise NotImplementedError

    def counted(self, index: Tensor) -> Tensor:
        """How many rows each expert gets, from the expert of every row."""
        return torch.bincount(index, minlength=self.experts)[: self.experts]

    def told(self, counts: Tensor) -> tuple[Tensor, Tensor]:
        """How many rows go to the experts of every rank, ``[ranks, experts of one]``, and how many come for this one's.

        The last rank may have fewer experts than the others; it is sent no rows for those that it lacks.
        """
        ranks, each = self.group.size, -(-self.experts // self.group.size)
        counts = pad(counts, [0, each * ranks - self.experts]).view(ranks, each)
        coming = c.all_to_all(counts, [1] * ranks, [1] * ranks, self.group)
        start, end = self.group.bounds(self.experts)
        return counts, coming[:, : end - start].contiguous()

    def arrivals(self, counts: Tensor) -> Arrivals:
        """What comes, where this rank sends ``counts`` rows to every expert."""
        counts, coming = self.told(counts)
        ranks = self.group.size
        # The only place where the host waits for the device.
        numbers = torch.cat([counts.sum(1), coming.sum(1), coming.sum(0)]).tolist()
        return Arrivals(numbers[:ranks], numbers[ranks : 2 * ranks], numbers[2 * ranks :], coming)


@dataclass(frozen=True)
class Arrivals:
    """How many rows go to each rank and come from each, how many each of this rank's experts gets, and from whom."""

    send: list[int]
    receive: list[int]
    sizes: list[int]
    coming: Tensor

    def own_experts(self) -> Tensor:
        """For every row that comes, which of this rank's experts it is for: by rank of origin, then by expert."""
        ranks, here = self.coming.shape
        own = torch.arange(here, device=self.coming.device).repeat(ranks)
        return own.repeat_interleave(self.coming.reshape(-1), output_size=sum(self.receive))


class RoutedExperts(ExpertExchange):
    """Called with tokens, the experts that each goes to, and their weights."""

    def run(self, module: nn.Module, forward: Forward, *values: Any) -> Tensor:
        tokens, index, weights = (x.flatten(0, -2) for x in values)
        if self.sharing is None:
            return self._exchanged(module, forward, tokens, index, weights).view(values[0].shape)
        mine = [c.scatter(x, 0, self.sharing) for x in (tokens, index, weights)]
        result = self._exchanged(module, forward, *mine)
        return c.gather(result, 0, tokens.shape[0], self.sharing, partial_grad=False).view(values[0].shape)

    def _exchanged(self, module: nn.Module, forward: Forward, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        choices, flat = index.shape[-1], index.reshape(-1)
        order = torch.argsort(flat, stable=True)
        # Some routers name an expert that there is not, for a choice that is to be left out: it is sent nowhere.
        arrivals = self.arrivals(self.counted(flat))
        order = order[: sum(arrivals.send)]
        rows = _ToRows.apply(hidden, order, choices)
        rows = c.exchange(rows, arrivals.send, arrivals.receive, self.group)
        results = self._computed(module, forward, rows, arrivals)
        results = c.exchange(results, arrivals.receive, arrivals.send, self.group)
        placed = _FromRows.apply(results, order, hidden.shape[0], choices)
        return (placed * weights.unsqueeze(-1)).sum(1).to(hidden.dtype)

    def _computed(self, module: nn.Module, forward: Forward, rows: Tensor, arrivals: Arrivals) -> Tensor:
        if rows.shape[0]:
            own = arrivals.own_experts().unsqueeze(-1)
            return forward(rows, own, rows.new_ones(own.shape)).view(rows.shape)
        # Nothing came. The other ranks that hold parts of these experts wait for this one's gradients all the same.
        return with_others_in_graph(rows, (p for p in module.parameters() if not isinstance(p, DTensor)))


class SortedExperts(ExpertExchange):
    """Called with rows in the order of their experts, and how many rows each expert has."""

    def run(self, module: nn.Module, forward: Forward, *values: Any) -> Tensor:
        rows, sizes = values
        if self.sharing is None:
            return self._exchanged(forward, rows, torch.tensor(sizes, device=rows.device))
        start, end = self.sharing.bounds(rows.shape[0])
        ends = torch.tensor(sizes).cumsum(0).clamp(start, end)
        counts = ends.diff(prepend=torch.tensor([start])).to(rows.device)
        result = self._exchanged(forward, c.scatter(rows, 0, self.sharing), counts)
        return c.gather(result, 0, rows.shape[0], self.sharing, partial_grad=False)

    def _exchanged(self, forward: Forward, rows: Tensor, counts: Tensor) -> Tensor:
        arrivals = self.arrivals(counts)
        rows = c.exchange(rows, arrivals.send, arrivals.receive, self.group)
        order = torch.argsort(arrivals.own_experts(), stable=True)
        results = self.compute(forward, _ToRows.apply(rows, order, 1), arrivals)
        results = _FromRows.apply(results, order, rows.shape[0], 1).squeeze(1)
        return c.exchange(results, arrivals.receive, arrivals.send, self.group)

    def compute(self, forward: Forward, rows: Tensor, arrivals: Arrivals) -> Tensor:
        """This rank's experts on the rows that came, in the order of the experts."""
        return forward(rows, arrivals.sizes)


class AlikeExperts(SortedExperts):
    """Called with rows in the order of their experts, equally many for each."""

    def run(self, module: nn.Module, forward: Forward, *values: Any) -> Tensor:
        (rows,) = values
        by_expert = rows.unflatten(0, (self.experts, -1))
        if self.sharing is None:
            return self._of_each(forward, by_expert).flatten(0, 1)
        result = self._of_each(forward, c.scatter(by_expert, 1, self.sharing))
        return c.gather(result, 1, by_expert.shape[1], self.sharing, partial_grad=False).flatten(0, 1)

    def _of_each(self, forward: Forward, by_expert: Tensor) -> Tensor:
        experts, each = by_expert.shape[:2]
        counts = torch.full((experts,), each, device=by_expert.device)
        return self._exchanged(forward, by_expert.flatten(0, 1), counts).unflatten(0, (experts, each))

    def compute(self, forward: Forward, rows: Tensor, arrivals: Arrivals) -> Tensor:
        return forward(rows)


EXCHANGES: dict[str, type[ExpertExchange]] = {
    "routed": RoutedExperts,
    "sorted": SortedExperts,
    "alike": AlikeExperts,
}
