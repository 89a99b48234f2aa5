"""Models that are not from transformers, each in a style of its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class NanoAttention(nn.Module):
    """Fused q|k|v; the width is read off the input, which on a rank is wider than what the code works on."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.n_head, self.n_embd = heads, width

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.size()
        q, k, v = (y.view(b, t, self.n_head, c // self.n_head).transpose(1, 2) for y in self.c_attn(x).split(c, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).contiguous().view(b, t, c))


class MiniAttention(NanoAttention):
    """As above, but for a width that is read off an attribute too, separate heads and an explicit mask."""

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        q, k, v = self.c_attn(x).split(self.n_embd, dim=-1)
        q, k, v = (y.view(batch, time, self.n_head, width // self.n_head).permute(0, 2, 1, 3) for y in (q, k, v))
        scores = q @ k.mT / (width // self.n_head) ** 0.5
        scores = scores.masked_fill(torch.ones(time, time, device=x.device).triu(1).bool(), -torch.inf)
        return self.c_proj((scores.softmax(-1) @ v).permute(0, 2, 1, 3).reshape(batch, time, width))


class NanoBlock(nn.Module):
    def __init__(self, width: int, heads: int, attention: type[nn.Module] = NanoAttention) -> None:
        super().__init__()
        self.ln_1, self.attn, self.ln_2 = nn.LayerNorm(width), attention(width, heads), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NanoGPT(nn.Module):
    attention: type[nn.Module] = NanoAttention

    def __init__(self, width: int = 32, heads: int = 4, layers: int = 4, vocabulary: int = 96) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(32, width)
        self.h = nn.ModuleList(NanoBlock(width, heads, self.attention) for _ in range(layers))
        self.ln_f, self.lm_head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, idx: Tensor) -> Tensor:
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1], device=idx.device))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


class MiniGPT(NanoGPT):
    attention = MiniAttention


@dataclass
class Sizes:
    """A config that computes one size from others."""

    heads: int = 4
    head_size: int = 8

    @property
    def all_head_size(self) -> int:
        return self.heads * self.head_size


class ComputedSizesAttention(nn.Module):
    """Reads its sizes from an object that it holds under a name of its own: one is stored, one is computed."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.sizes = Sizes(heads, width // heads)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        shape = (b, t, self.sizes.heads, self.sizes.head_size)
        q, k, v = (layer(x).view(shape).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).reshape(b, t, self.sizes.all_head_size))


class ComputedSizesGPT(NanoGPT):
    attention = ComputedSizesAttention


class Oracle(nn.Module):
    """Unusual names, sizes in attributes, grouped heads, a norm and a temperature on the heads, in parallel."""

    def __init__(self, width: int, troops: int, scouts: int) -> None:
        super().__init__()
        self.troops, self.scouts, self.reach = troops, scouts, width // troops
        self.ask = nn.Linear(width, troops * self.reach, bias=False)
        self.hint, self.gist = (nn.Linear(width, scouts * self.reach, bias=False) for _ in range(2))
        self.tell = nn.Linear(troops * self.reach, width)
        self.calm = nn.LayerNorm(self.reach)
        self.heat = nn.Parameter(torch.ones(troops))
        self.rise, self.sink = nn.Linear(width, 2 * 48), nn.Linear(48, width)
        self.still = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        z = self.still(x)
        b, t = z.shape[:2]
        q = self.calm(self.ask(z).view(b, t, self.troops, self.reach)).transpose(1, 2)
        k, v = (f(z).view(b, t, self.scouts, self.reach).transpose(1, 2) for f in (self.hint, self.gist))
        k, v = (y.repeat_interleave(self.troops // self.scouts, dim=1) for y in (k, v))
        score = (q @ k.transpose(-1, -2)) * self.heat.view(1, -1, 1, 1)
        heads = (score.softmax(-1) @ v).transpose(1, 2).flatten(2)
        up, gate = self.rise(z).chunk(2, dim=-1)
        return x + self.tell(heads) + self.sink(up * torch.sigmoid(gate))


class Temple(nn.Module):
    def __init__(self, width: int = 32, layers: int = 3, vocabulary: int = 96) -> None:
        super().__init__()
        self.runes = nn.Embedding(vocabulary, width)
        self.choir = nn.ModuleList(Oracle(width, 4, 2) for _ in range(layers))
        self.verdict = nn.Linear(width, vocabulary)

    def forward(self, signs: Tensor) -> Tensor:
        x = self.runes(signs)
        for oracle in self.choir:
            x = oracle(x)
        return self.verdict(x)


class VisionBlock(nn.Module):
    """q|k|v packed as [3, heads, features], a scale per feature on each branch."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.gamma = nn.Parameter(torch.full((width,), 0.5))
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.gamma * self.proj(y)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class VisionTransformer(nn.Module):
    def __init__(self, width: int = 32, heads: int = 4, layers: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, kernel_size=8, stride=8)
        self.token, self.place = nn.Parameter(torch.randn(1, 1, width)), nn.Parameter(torch.randn(1, 17, width))
        self.blocks = nn.Sequential(*(VisionBlock(width, heads) for _ in range(layers)))  # as timm keeps them
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.place
        return self.head(self.norm(self.blocks(x)[:, 0]))


class Mixer(nn.Module):
    """A convolution that mixes channels, so whole; then a gated linear recurrence, each channel on its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter, self.conv, self.leave = nn.Linear(width, width), nn.Conv1d(width, width, 3), nn.Linear(width, width)
        self.value, self.forget, self.back = nn.Linear(width, 48), nn.Linear(width, 48), nn.Linear(48, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        y = F.pad(self.enter(self.norm1(x)).transpose(1, 2), (2, 0))
        x = x + self.leave(self.conv(y).transpose(1, 2))
        z = self.norm2(x)
        state, keep, states = 0.0, torch.sigmoid(self.forget(z)), []
        for value, kept in zip(self.value(z).unbind(1), keep.unbind(1), strict=True):
            state = kept * state + (1 - kept) * value
            states.append(state)
        return x + self.back(torch.stack(states, dim=1))


class Recurrent(nn.Module):
    def __init__(self, width: int = 32, layers: int = 3, vocabulary: int = 96) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Mixer(width) for _ in range(layers))
        self.out = nn.Linear(width, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.out(x)


HANDWRITTEN = {
    "nano": NanoGPT,
    "mini": MiniGPT,
    "computed": ComputedSizesGPT,
    "temple": Temple,
    "vision": VisionTransformer,
    "recurrent": Recurrent,
}


def example(name: str) -> Tensor:
    """Inputs for one of them."""
    generator = torch.Generator().manual_seed(0)
    if name == "vision":
        return torch.randn(2, 3, 32, 32, generator=generator)
    return torch.randint(96, (2, 12), generator=generator)
