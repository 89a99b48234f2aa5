"""Experts on ranks of their own, as they run where every expert gets as many tokens: no value says how many."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from shardwright.distributed.runtime.expert_exchange import EXCHANGES, Arrivals, ExpertExchange
from shardwright.distributed.runtime.forward import Forward


class _Balanced(ExpertExchange):
    def run(self, module: nn.Module, forward: Forward, *values: Any) -> Tensor:
        choices = values[1] if len(values) == len(("tokens", "index", "weights")) else values[0][:, 0]
        sharing = 1 if self.sharing is None else self.sharing.size
        self.rows = -(-choices.numel() // sharing)
        return super().run(module, forward, *values)

    def counted(self, index: Tensor) -> Tensor:
        return index.new_empty(self.experts)

    def arrivals(self, counts: Tensor) -> Arrivals:
        """Every expert gets as many rows from every rank; the last rank may have fewer experts."""
        _, coming = self.told(counts)
        ranks, each = self.group.size, -(-self.experts // self.group.size)
        held = [max(min(each, self.experts - rank * each), 0) for rank in range(ranks)]
        send = [self.rows * count // self.experts for count in held]
        send[0] += self.rows - sum(send)
        receive = [send[self.group.rank]] * ranks
        own = held[self.group.rank]
        sizes = [sum(receive) // own] * own
        sizes[0] += sum(receive) - sum(sizes)
        return Arrivals(send, receive, sizes, coming)


BALANCED: dict[str, type[ExpertExchange]] = {
    kind: type(f"Balanced{exchange.__name__}", (_Balanced, exchange), {}) for kind, exchange in EXCHANGES.items()
}
