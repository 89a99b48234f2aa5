"""Values that no file holds: random weights that depend on a seed alone, and computed buffers.

A *skeleton* is the whole model on the meta device, as it was before anything was sharded. Initialisation code runs on
it one tensor at a time: that tensor is real, on the CPU, all others stay on meta, where writing costs nothing. So no
rank ever holds more than one whole tensor, and what is drawn does not depend on the mesh.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shardwright._torch import version_of
from shardwright._transformers import initialise_module
from shardwright.errors import UnsupportedError

Init = Callable[[], None]
_WAY_ROUND = (
    "Make the model once with transformers (AutoModelForCausalLM.from_config(config).save_pretrained(folder)) and load "
    "that folder, each rank its shards (in shardwright train: model.path=folder)."
)


class Initial(Protocol):
    """Who knows the values that a model begins with."""

    def value(self, name: str) -> Tensor:
        """The whole initial value of a parameter or buffer, on the CPU."""
        ...


class Initialiser:
    """Initial values of the tensors of ``skeleton``: what transformers' ``_init_weights`` gives, tensor by tensor.

    Args:
        skeleton: the whole model on meta. It is on meta again after every call.
        seed: the values of a parameter follow from this and its name.
    """

    def __init__(self, skeleton: PreTrainedModel, seed: int = 0) -> None:
        self._skeleton = skeleton
        self._seed = seed
        self._homes, self._first_names = _homes(skeleton)
        self._calls = list(_init_calls(skeleton))
        self._around: dict[nn.Module, list[int]] = defaultdict(list)  # module -> calls on it and on what holds it
        for index, (module, _) in enumerate(self._calls):
            for inside in module.modules():
                self._around[inside].append(index)

    def value(self, name: str) -> Tensor:
        """The whole initial value of a parameter or buffer, on the CPU.

        Raises:
            UnsupportedError: the model has no code that initialises it.
        """
        name = self._first_names[name]
        inits = self._find_inits(name)
        blank = _blank(_get(*self._homes[name][0]))
        with self._real(name, blank), self._seeded(name), torch.no_grad(), torch.device("cpu"):
            try:
                for init in inits:
                    init()
            except (RuntimeError, NotImplementedError) as error:
                raise UnsupportedError(
                    f"{type(self._skeleton).__name__}._init_weights cannot initialise {name} on its own ({error}). "
                    f"{_WAY_ROUND}"
                ) from error
            made = _get(*self._homes[name][0]).detach()
        if made.device.type == "meta" or _is_blank(made):
            raise UnsupportedError(
                f"{type(self._skeleton).__name__}._init_weights does not initialise {name}, so it cannot be made on "
                f"the meta device. {_WAY_ROUND}"
            )
        return made

    def _find_inits(self, name: str) -> list[Init]:
        """The calls that write one tensor, in transformers' order; the owner's call where no write is seen."""
        homes = self._homes[name]
        found: list[Init] = []
        for index in sorted({index for owner, _ in homes for index in self._around[owner]}):
            module, init = self._calls[index]
            before = {home: (_get(*home), version_of(_get(*home))) for home in homes}
            with torch.no_grad():
                init()
            for home, (tensor, version) in before.items():
                now = _get(*home)
                written = now is not tensor or version_of(now) != version
                if (written or home[0] is module) and init not in found:
                    found.append(init)
                if now is not tensor:
                    _set(*home, tensor)
        return found

    @contextmanager
    def _real(self, name: str, value: Tensor) -> Generator[None, None, None]:
        homes = self._homes[name]
        meta = _get(*homes[0])
        for home in homes:
            _set(*home, value)
        try:
            yield
        finally:
            for home in homes:
                _set(*home, meta)

    @contextmanager
    def _seeded(self, name: str) -> Generator[None, None, None]:
        digest = hashlib.sha256(f"{self._seed}/{name}".encode()).digest()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            yield


def _init_calls(model: PreTrainedModel) -> Iterator[tuple[nn.Module, Init]]:
    """Every module with its initialisation, children first; a model inside a model has its own."""

    def walk(module: nn.Module, owner: PreTrainedModel) -> Iterator[tuple[nn.Module, Init]]:
        for child in module.children():
            yield from walk(child, child if isinstance(child, PreTrainedModel) else owner)
        yield module, lambda: initialise_module(owner, module)

    yield from walk(model, model)


def _homes(model: nn.Module) -> tuple[dict[str, list[tuple[nn.Module, str]]], dict[str, str]]:
    """First name of every tensor -> every (module, attribute) that holds it; and every name -> that first name."""
    first_names: dict[str, str] = {}
    by_tensor: dict[int, str] = {}
    homes: dict[str, list[tuple[nn.Module, str]]] = defaultdict(list)
    for path, module in model.named_modules(remove_duplicate=False):
        for key, tensor in _own_tensors(module):
            name = f"{path}.{key}" if path else key
            first_names[name] = by_tensor.setdefault(id(tensor), name)
            homes[first_names[name]].append((module, key))
    return homes, first_names


def _own_tensors(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    held = [*module._parameters.items(), *module._buffers.items()]
    return [(key, tensor) for key, tensor in held if tensor is not None]


def _get(module: nn.Module, key: str) -> Tensor:
    tensor = module._parameters[key] if key in module._parameters else module._buffers[key]
    assert tensor is not None
    return tensor


def _set(module: nn.Module, key: str, tensor: Tensor) -> None:
    if key in module._parameters:
        assert isinstance(tensor, nn.Parameter)
        module._parameters[key] = tensor
    else:
        module._buffers[key] = tensor


def _blank(meta: Tensor) -> Tensor:
    """A tensor like ``meta`` on the CPU, filled with a value that no initialisation writes."""
    value = torch.full(meta.shape, _filler(meta.dtype), dtype=meta.dtype, device="cpu")
    return nn.Parameter(value, requires_grad=meta.requires_grad) if isinstance(meta, nn.Parameter) else value


def _filler(dtype: torch.dtype) -> float | int | bool:
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    return True if dtype is torch.bool else torch.iinfo(dtype).min


def _is_blank(value: Tensor) -> bool:
    """Whether some of ``value`` was left as :func:`_blank` made it. Not known for booleans: never, then."""
    filler = _filler(value.dtype)
    if filler is True or not value.numel():
        return False
    if filler == filler:
        return bool(value.amin() == filler)
    real = torch.view_as_real(value) if value.is_complex() else value
    return bool(real.amax().isnan())  # NaN wins; no mask is made
