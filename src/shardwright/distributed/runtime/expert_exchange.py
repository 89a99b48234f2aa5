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

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from shardwright.distributed.runtime import collectives as c
from shardwright.distributed.runtime.forward import Around, Forward, attributes_as, local_parameters, parameters_as


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


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


class _UsedByNone(torch.autograd.Function):
    """``x`` itself; backward gives every parameter a gradient of zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.like = [(p.shape, p.dtype, p.device) for p in parameters]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        zeros = (torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like)
        return grad, *zeros


class ExpertExchange(Around):
    """Around a module that holds this rank's experts, and is called with tokens, their experts and their weights.

    Args:
        experts: how many there are on all ranks.
        arguments: what the module's forward calls the tokens, their experts and their weights.
        mesh: the one-dimensional mesh of the ranks among which they are spread, in equal parts.
        sharing: the mesh of the ranks that are called with the same tokens; None where no others are.
        gradient_factor: what the gradients of the experts' parameters are multiplied by. Every rank's gradient is a sum
            over the tokens that came to it, from all ranks.
    """

    def __init__(
        self,
        experts: int,
        arguments: tuple[str, str, str],
        mesh: DeviceMesh,
        sharing: DeviceMesh | None,
        gradient_factor: float,
    ) -> None:
        self.experts, self.arguments = experts, arguments
        self.group = c.Group.of(mesh)
        self.sharing = None if sharing is None or sharing.size() == 1 else c.Group.of(sharing)
        self.gradient_factor = gradient_factor

    @torch.compiler.disable  # how many rows come and go is only known when it runs
    def __call__(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        values = {**dict(zip(self.arguments, args, strict=False)), **kwargs}
        hidden, index, weights = (values[name] for name in self.arguments)
        local = {name: self._scaled(tensor) for name, tensor in local_parameters(module).items()}
        with parameters_as(module, local), attributes_as(module, {"num_experts": self.experts // self.group.size}):
            if self.sharing is None:
                return self._exchanged(module, forward, hidden, index, weights)
            mine = [c.scatter(x, 0, self.sharing) for x in (hidden, index, weights)]
            result = self._exchanged(module, forward, *mine)
            return c.gather(result, 0, hidden.shape[0], self.sharing, partial_grad=False)

    def _scaled(self, param: Tensor) -> Tensor:
        if self.gradient_factor == 1 or not param.requires_grad:
            return param
        return _ScaleGradient.apply(param, self.gradient_factor)

    def _exchanged(self, module: nn.Module, forward: Forward, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        choices, ranks = index.shape[-1], self.group.size
        flat = index.reshape(-1)
        order = torch.argsort(flat, stable=True)
        # Some routers name an expert that there is not, for a choice that is to be left out: it is sent nowhere.
        counts = torch.bincount(flat, minlength=self.experts)[: self.experts].view(ranks, -1)
        coming = c.all_to_all(counts, [1] * ranks, [1] * ranks, self.group)
        send, receive = torch.stack([counts.sum(1), coming.sum(1)]).tolist()
        order = order[: sum(send)]
        rows = c.exchange(_ToRows.apply(hidden, order, choices), send, receive, self.group)
        own = torch.arange(coming.shape[1], device=flat.device).repeat(ranks)
        own = own.repeat_interleave(coming.view(-1), output_size=sum(receive))
        results = c.exchange(self._computed(module, forward, rows, own), receive, send, self.group)
        placed = _FromRows.apply(results, order, hidden.shape[0], choices)
        return (placed * weights.unsqueeze(-1)).sum(1).to(hidden.dtype)

    def _computed(self, module: nn.Module, forward: Forward, rows: Tensor, own: Tensor) -> Tensor:
        """This rank's experts on what came, each row to the expert ``own`` says."""
        if rows.shape[0]:
            return forward(rows, own.unsqueeze(-1), rows.new_ones(rows.shape[0], 1))
        # Nothing came. The other ranks that hold parts of these experts wait for this one's gradients all the same.
        return _UsedByNone.apply(rows, *_trained(module.parameters()))


def _trained(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [p for p in parameters if p.requires_grad and not isinstance(p, DTensor)]
