"""Mixtures whose experts are modules in a list, in the forms in which such code is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, one_hot, silu, softplus
from torch.utils.checkpoint import checkpoint
from transformers import MixtralConfig, MixtralForCausalLM

WIDTH, EXPERTS = 32, 4


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(WIDTH, 24, bias=False), nn.Linear(WIDTH, 24)
        self.down_proj = nn.Linear(24, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))
        return result


class Mixture(nn.Module):
    """A router and a list of experts; each kind calls them in another way."""

    expert: Callable[[], nn.Module] = Expert

    def __init__(self) -> None:
        super().__init__()
        self.gate: nn.Module = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts: nn.Module = nn.ModuleList(type(self).expert() for _ in range(EXPERTS))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.mixed(hidden.view(-1, WIDTH)).view(hidden.shape)

    def mixed(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.topk(self.gate(x).softmax(-1), 2, dim=-1)

    def each(self) -> Iterator[nn.Module]:
        yield from self.experts.children()


class ByMask(Mixture):
    """Every expert is called, be it without a token."""

    def mixed(self, x: Tensor) -> Tensor:
        weights, chosen = self.route(x)
        mask, total = one_hot(chosen, EXPERTS).permute(2, 1, 0), torch.zeros_like(x)
        for number, expert in enumerate(self.each()):
            choice, token = torch.where(mask[number])
            total.index_add_(0, token, expert(x[token]) * weights[token, choice, None])
        return total


class ByHits(Mixture):
    """As Mixtral's code was before transformers 5: jitter, and experts without a token are left out."""

    def forward(self, hidden: Tensor) -> Tensor:
        if self.training:
            hidden *= torch.empty_like(hidden).uniform_(1.0, 1.0)
        return super().forward(hidden)

    def mixed(self, x: Tensor) -> Tensor:
        weights, chosen = self.route(x)
        mask, total = one_hot(chosen, EXPERTS).permute(2, 1, 0), torch.zeros_like(x)
        for hit in mask.sum((-1, -2)).nonzero():
            choice, token = torch.where(mask[hit].squeeze(0))
            found = self.experts[int(hit)](x[None, token].reshape(-1, WIDTH))  # type: ignore[index]
            found *= weights[token, choice, None]
            total.index_add_(0, token, found)
        return total


class ByRepeating(Mixture):
    """As the code that comes with DeepSeek's weights, which is another one in evaluation."""

    def mixed(self, x: Tensor) -> Tensor:
        weights, chosen = self.route(x)
        if not self.training:
            return self.sorted(x, weights, chosen)
        repeated, flat = x.repeat_interleave(2, dim=0), chosen.flatten()
        found = torch.empty_like(repeated)
        for number, expert in enumerate(self.each()):
            found[flat == number] = expert(repeated[flat == number])
        return (found.view(*weights.shape, -1) * weights.unsqueeze(-1)).sum(1)

    @torch.no_grad()
    def sorted(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        order = chosen.view(-1).argsort(stable=True)
        counts = torch.bincount(chosen.view(-1), minlength=EXPERTS).cpu().numpy()
        parts = x[order // 2].split(counts.tolist())
        found = torch.cat([expert(part) for expert, part in zip(self.each(), parts, strict=True) if len(part)])
        placed = torch.empty_like(found)
        placed[order] = found
        return placed.view(*chosen.shape, -1).mul_(weights.unsqueeze(-1)).sum(1)


class EveryToken(Mixture):
    """Every expert gets every token, in the form ``[batch, positions, features]``."""

    def forward(self, hidden: Tensor) -> Tensor:
        weights = self.gate(hidden).softmax(-1)
        found = [expert(hidden) * weights[..., n, None] for n, expert in enumerate(self.each())]
        return torch.stack(found).sum(0)


class ByName(ByMask):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleDict({f"expert_{n}": Expert() for n in range(EXPERTS)})


class _Calls(nn.Module):
    """Experts behind a module of their own, away from the router."""

    def __init__(self) -> None:
        super().__init__()
        self.all = nn.ModuleList(Expert() for _ in range(EXPERTS))


class Behind(ByMask):
    def __init__(self) -> None:
        super().__init__()
        self.experts = _Calls()

    def each(self) -> Iterator[nn.Module]:
        yield from self.experts.get_submodule("all").children()


class _Normed(Expert):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x))


class _Weighted(Expert):
    def forward(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        assert weights is not None
        return super().forward(x) * weights


class WeightsInside(Mixture):
    """Experts weigh their results themselves, as the first code of Mixtral had it."""

    expert = _Weighted

    def mixed(self, x: Tensor) -> Tensor:
        weights, chosen = self.route(x)
        total = torch.zeros_like(x)
        for number, expert in enumerate(self.each()):
            token, choice = torch.where(chosen == number)
            total[token] += expert(x[token], weights=weights[token, choice, None])
        return total


class Capacity(Mixture):
    """One choice, and room for three tokens in each expert: the others pass by."""

    def mixed(self, x: Tensor) -> Tensor:
        weights, chosen = self.gate(x).softmax(-1).max(-1)
        result = x.clone()
        for number, expert in enumerate(self.each()):
            token = torch.where(chosen == number)[0][:3]
            if len(token):
                result[token] = expert(x[token])
        return result * weights[:, None]


class Shared(ByMask):
    """Beside a shared expert, with a module behind the experts, and a router that draws noise."""

    def __init__(self) -> None:
        super().__init__()
        self.noise, self.shared, self.norm = nn.Linear(WIDTH, EXPERTS), Expert(), nn.LayerNorm(WIDTH)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.gate(x) + 0.0 * torch.randn(len(x), EXPERTS) * softplus(self.noise(x))
        return torch.topk(logits.softmax(-1), 2, dim=-1)

    def mixed(self, x: Tensor) -> Tensor:
        result: Tensor = self.norm(super().mixed(x)) + self.shared(x)
        return result


class _Counting(nn.Module):
    load: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, WIDTH) / WIDTH**0.5)
        self.register_buffer("load", torch.zeros(EXPERTS))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = linear(x, self.weight).softmax(-1)
        chosen = torch.topk(scores - 0.01 * self.load, 2, dim=-1).indices
        self.load += torch.bincount(chosen.flatten(), minlength=EXPERTS)
        return scores.gather(-1, chosen), chosen


class Balanced(ByHits):
    """A router that chooses by what it has counted, and counters of the code's own."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.calls = _Counting(), 0
        self.register_buffer("seen", torch.zeros(EXPERTS))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, chosen = self.gate(x)
        self.seen += torch.bincount(chosen.flatten(), minlength=EXPERTS)
        self.calls += 1
        return weights + 0.01 * self.seen[chosen], chosen


class WithoutGradients(Mixture):
    """The first expert is called as it is, its results are constants; each expert has a norm of its own."""

    expert = _Normed

    def mixed(self, x: Tensor) -> Tensor:
        weights, chosen = self.route(x)
        total = torch.zeros_like(x)
        for number, expert in enumerate(self.each()):
            token, choice = torch.where(chosen == number)
            with torch.set_grad_enabled(torch.is_grad_enabled() and number > 0):
                found = expert(x[token])
            total = total.index_add(0, token, found * weights[token, choice, None])
        return total


class TwoLists(Mixture):
    """The two matrices of an expert stand in lists of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(WIDTH, 24) for _ in range(EXPERTS))
        self.down = nn.ModuleList(nn.Linear(24, WIDTH) for _ in range(EXPERTS))

    def mixed(self, x: Tensor) -> Tensor:
        weights, chosen = self.route(x)
        total = torch.zeros_like(x)
        for number, (up, down) in enumerate(zip(self.each(), self.down, strict=True)):
            token, choice = torch.where(chosen == number)
            total.index_add_(0, token, down(silu(up(x[token]))) * weights[token, choice, None])
        return total


class Recomputing(ByMask):
    """Its code has itself run once more in backward."""

    def mixed(self, x: Tensor) -> Tensor:
        return checkpoint(super().mixed, x, use_reentrant=False) if self.training else super().mixed(x)


class Chained(Mixture):
    """No mixture: an expert gets what the one before it made."""

    def mixed(self, x: Tensor) -> Tensor:
        for expert in self.each():
            x = x + expert(x)
        return x * self.gate(x).sum(-1, keepdim=True)


class Looking(Mixture):
    """What becomes of a result depends on its values."""

    def mixed(self, x: Tensor) -> Tensor:
        found = [result if (result := expert(x)).sum() > 0 else -result for expert in self.each()]
        return torch.stack(found).sum(0) * self.gate(x).sum(-1, keepdim=True)


class _Centred(Expert):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(0))


class Mixing(ByMask):
    """Experts whose tokens depend on each other."""

    expert = _Centred


def model_with(*kinds: Callable[[], nn.Module]) -> nn.Module:
    """A Mixtral with a layer for each of ``kinds``."""
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = MixtralForCausalLM(MixtralConfig(**sizes, num_hidden_layers=len(kinds), vocab_size=64, num_local_experts=4))
    for layer, kind in zip(model.model.layers, kinds, strict=True):
        layer.mlp = kind()
    return model


def favouring(model: nn.Module, expert: int) -> nn.Module:
    """``model``, whose tokens now go to ``expert`` and the one behind it."""
    for layer in model.get_submodule("model.layers").children():
        layer.get_submodule("post_attention_layernorm").get_parameter("weight").data[0] = 3.0
        weight = layer.get_submodule("mlp.gate").get_parameter("weight").data
        weight *= 0.01
        weight[expert, 0], weight[expert + 1, 0] = 2.0, 1.0
    model.get_submodule("model.embed_tokens").get_parameter("weight").data[:, 0] = 10.0
    return model
