"""A *weightless copy* of a model: same code, same structure, no big weights.

Whether a region can run on slices does not depend on what its matrices hold, only on the code between them. So the copy
keeps the model's modules and small parameters (norms, slopes, kernels; random values, since only generic values prove
anything), and each matrix is a parameter that takes no memory: every linear layer and every table in the copy is a
*stub*, whose outputs a :class:`~shardwright.distributed.replay.record.Recorder` hands out. A 405B model is a few
megabytes this way, and running it takes milliseconds.
"""

from __future__ import annotations

import copy
from collections.abc import Container
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from shardwright._transformers import attention_of, set_attention
from shardwright.distributed.replay.record import CODE_ERRORS, Idle, Recorder
from shardwright.distributed.replay.repeats import Repeats, find_repeats
from shardwright.distributed.replay.short_chunks import Chunks
from shardwright.distributed.styles.linear import is_transposed

# Parameters above this size, outside of linear layers and tables, are not given values: their module becomes a stub.
LARGEST_REAL = 1 << 22


@dataclass(frozen=True)
class Stub:
    """A module whose outputs come from the recorder.

    Attributes:
        kind: ``"linear"``, ``"table"`` (an embedding) or ``"opaque"`` (a module whose inside is not looked at; its
            output is taken to have the shape of its first input).
        width_in: input features of a linear layer, rows of a table.
        width_out: output features.
    """

    kind: str
    width_in: int
    width_out: int


@dataclass
class WeightlessCopy:
    """The copy and what is known about it.

    Attributes:
        model: the copy, in eval mode, on CPU, float32.
        repeats: which entries of its module lists stand for which entries of the original.
        stubs: copied module name -> its stub.
        recorder: what the stubs ask; set for each run.
        chunks: the chunks of the sequence that are shortened in runs.
    """

    model: nn.Module
    repeats: Repeats
    stubs: dict[str, Stub]
    recorder: Recorder = field(default_factory=Idle)
    chunks: Chunks = field(default_factory=Chunks)


def weightless_copy(model: nn.Module, *, whole: bool = False) -> WeightlessCopy:
    """Copy ``model`` without its weights.

    Args:
        whole: keep every repeated block. Otherwise two of each kind stay, which is all that there is to learn.
    """
    repeats = find_repeats(model, keep=None if whole else 2)
    opaque = {id(m) for m in model.modules() if _stub_kind(m) is None and any(map(_too_big, m._parameters.values()))}
    memo: dict[int, Any] = {id(block): nn.Identity() for block in repeats.dropped(model)}
    generator = torch.Generator().manual_seed(0)
    for module in _modules_but(model, memo.keys()):
        stubbed = _stub_kind(module) is not None or id(module) in opaque
        for param in module._parameters.values():
            if param is not None and id(param) not in memo:
                memo[id(param)] = _weightless(param) if stubbed else _random_parameter(param, generator)
        for name, tensor in _other_tensors(module).items():
            if tensor.is_meta or tensor.dtype in (torch.bfloat16, torch.float16):
                memo[id(tensor)] = _random_buffer(tensor, name, generator)
            elif tensor.device.type != "cpu":
                memo[id(tensor)] = tensor.detach().cpu()
    where = {id(m): name for name, m in model.named_modules()}
    kinds = {where[key]: "opaque" for key in opaque}
    kinds |= {name: kind for name, m in model.named_modules() if (kind := _stub_kind(m)) is not None}
    copied = _copied(model, memo).eval()
    repeats.truncate(copied)
    _use_plain_attention(copied)
    weightless = WeightlessCopy(copied, repeats, {})
    for name, module in copied.named_modules(remove_duplicate=False):
        kind = kinds.get(repeats.original_name(name))
        if kind is not None:
            weightless.stubs[name] = _install(weightless, name, module, kind)
    return weightless


def _copied(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deep copy. Hooks, and what cannot be copied (locks, iterators, results with a graph), are the original's."""
    modules = _modules_but(model, memo.keys())
    for module in modules:  # a hook may be a method of anything, a whole trainer
        memo |= {id(value): copy.copy(value) for key, value in vars(module).items() if "hooks" in key}
    try:
        return copy.deepcopy(model, dict(memo))
    except CODE_ERRORS:
        for module in modules:
            memo |= {id(value): value for key, value in _attributes(module).items() if not _can_be_copied(value, memo)}
        return copy.deepcopy(model, memo)


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {key: value for key, value in vars(module).items() if key not in ("_parameters", "_buffers", "_modules")}


def _can_be_copied(value: Any, memo: dict[int, Any]) -> bool:
    try:
        copy.deepcopy(value, dict(memo))
    except CODE_ERRORS:
        return False
    return True


def _modules_but(model: nn.Module, left_out: Container[int]) -> list[nn.Module]:
    """The modules of ``model``, those with these ids and what is below them left out."""
    found: dict[int, nn.Module] = {}
    open_ends = [model]
    while open_ends:
        module = open_ends.pop()
        if id(module) not in found and id(module) not in left_out:
            found[id(module)] = module
            open_ends += [child for child in reversed(module._modules.values()) if child is not None]
    return list(found.values())


def _stub_kind(module: nn.Module) -> str | None:
    if isinstance(module, nn.Embedding):
        return "table" if module.max_norm is None else None
    weight = module._parameters.get("weight")
    if weight is None or weight.ndim != 2 or module._modules or set(module._parameters) - {"weight", "bias"}:
        return None
    if type(module).forward is nn.Linear.forward or is_transposed(module):
        return "linear"
    return "linear" if _multiplies(module) else None


def _multiplies(module: nn.Module) -> bool:
    """Whether a module of unknown class computes ``x @ weight.T + bias``: asked of a small one of its kind."""
    probe = copy.copy(module)
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(5, 3, generator=generator), torch.randn(5, generator=generator)
    has_bias = module._parameters.get("bias") is not None
    probe.__dict__["_parameters"] = {"weight": nn.Parameter(weight), "bias": nn.Parameter(bias) if has_bias else None}
    x = torch.randn(2, 4, 3, generator=generator)
    try:
        with torch.no_grad():
            y = probe(x)
    except CODE_ERRORS:
        return False
    expected = nn.functional.linear(x, weight, bias if has_bias else None)
    return isinstance(y, Tensor) and y.shape == expected.shape and torch.allclose(y, expected, atol=1e-5)


def _too_big(param: nn.Parameter | None) -> bool:
    return param is not None and param.numel() > LARGEST_REAL


def _weightless(param: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(torch.zeros(()).expand(param.shape), requires_grad=True)


def _random_parameter(param: nn.Parameter, generator: torch.Generator) -> nn.Parameter:
    """Values as a trained model might have them: vectors around one, matrices that keep the scale of what they mix."""
    noise = torch.randn(param.shape, generator=generator)
    fan_in = param[0].numel() if param.ndim > 1 else 1
    return nn.Parameter(1 + 0.3 * noise if param.ndim < 2 else noise / max(fan_in, 1) ** 0.5)


def _other_tensors(module: nn.Module) -> dict[str, Tensor]:
    plain = {k: v for k, v in module.__dict__.items() if isinstance(v, Tensor)}
    return plain | {k: v for k, v in module._buffers.items() if v is not None}


def _random_buffer(buffer: Tensor, name: str, generator: torch.Generator) -> Tensor:
    """Something harmless in place of a buffer that has no values: masks let all pass, indices point at the start."""
    if buffer.dtype == torch.bool:
        return torch.ones(buffer.shape, dtype=torch.bool).tril()
    if not buffer.dtype.is_floating_point:
        return torch.zeros(buffer.shape, dtype=buffer.dtype)
    return 0.1 + 0.9 * torch.rand(buffer.shape, generator=generator)


def _use_plain_attention(model: nn.Module) -> None:
    """Attention kernels that need a GPU give way to torch's own, in the copy's own configs."""
    configs = {id(c): c for m in model.modules() if isinstance(c := m.__dict__.get("config"), PreTrainedConfig)}
    for config in configs.values():
        if "flash" in attention_of(config):
            set_attention(config, "sdpa")


def _install(weightless: WeightlessCopy, name: str, module: nn.Module, kind: str) -> Stub:
    if kind == "opaque":

        def opaque(*args: Any, **kwargs: Any) -> Tensor:
            return weightless.recorder.opaque(name, args, kwargs)

        module.forward = opaque
        return Stub(kind, 0, 0)
    weight = module._parameters["weight"]
    assert weight is not None
    rows, columns = weight.shape
    if kind == "table":
        _install_table(weightless, name, module, weight)
        return Stub(kind, rows, columns)
    width_in, width_out = (rows, columns) if is_transposed(module) else (columns, rows)

    def linear(x: Tensor) -> Tensor:
        return weightless.recorder.linear(name, x, width_out)

    module.forward = linear
    return Stub(kind, width_in, width_out)


def _install_table(weightless: WeightlessCopy, name: str, module: nn.Module, weight: Tensor) -> None:
    """Only the look-up itself is replaced, so that a subclass may scale or shift what comes out of the table."""
    own_forward = module.forward

    def look_up(*args: Any, **kwargs: Any) -> Any:
        with _Lookup(weight, lambda ids, width: weightless.recorder.table(name, ids, width)):
            return own_forward(*args, **kwargs)

    module.forward = look_up


class _Lookup(torch.overrides.TorchFunctionMode):
    """``F.embedding`` with one weight goes to ``answer``."""

    def __init__(self, weight: Tensor, answer: Any) -> None:
        super().__init__()
        self.weight = weight
        self.answer = answer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.embedding and args[1] is self.weight:
            return self.answer(args[0], self.weight.shape[1])
        return func(*args, **(kwargs or {}))
