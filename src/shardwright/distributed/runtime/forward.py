"""How a style gets around a module's ``forward`` without renaming, moving or copying the module.

``wrap_forward`` gives the instance a subclass of its own class (as FSDP2 does) whose ``forward`` runs a chain of
``Around`` objects with the original ``forward`` in the middle; ``wrap_method`` does so for a few other methods. Module
hooks, ``named_modules`` and ``isinstance`` stay as they were; what FSDP2 and activation checkpointing add later goes
outside. An ``Around`` refers to no module, so a deep copy of the model is a model of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache, wraps
from typing import Any, cast

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shardwright.errors import PlanError

Forward = Callable[..., Any]
METHODS = (
    "delete_adapter",
    "generate",
    "load_adapter",
    "merge",
    "merge_and_unload",
    "resize_token_embeddings",
    "save_pretrained",
    "unload",
    "unmerge",
)  # that can be wrapped, beside the forward


class Around:
    """Something that happens around one module's forward, or around another of its methods."""

    eager = False  # whether torch.compile must stay inside of it

    def __call__(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        raise NotImplementedError


def wrap_forward(module: nn.Module, around: Around, *, inside: Callable[[Around], bool] | None = None) -> None:
    """Put ``around`` outside of everything that already wraps ``module``'s forward.

    Args:
        inside: put it inside of all for which this is true, and of what is outside of that.
    """
    _become_wrapped(module)
    chain = arounds(module)
    place = max((n for n, each in enumerate(chain, 1) if inside is not None and inside(each)), default=0)
    module.__dict__["_around"] = (*chain[:place], around, *chain[place:])


def wrap_method(module: nn.Module, method: str, around: Around) -> None:
    """Put ``around`` outside of all that wraps ``method``, one of ``METHODS``; nothing where the class has none."""
    assert method in METHODS, method
    if hasattr(type(module), method):
        _become_wrapped(module)
        state = module.__dict__
        state["_own_methods"].setdefault(method, state.pop(method, None))
        state["_around_methods"][method] = (around, *state["_around_methods"].get(method, ()))


def _become_wrapped(module: nn.Module) -> None:
    state = module.__dict__
    if "_around" not in state:
        state["_around"] = ()
        state["_own_forward"] = state.pop("forward", None)  # a forward someone set on the instance stays in the middle
        state["_around_methods"], state["_own_methods"] = {}, {}
        module.__class__ = _wrapped(cast(Any, type(module)))


def arounds(module: nn.Module) -> tuple[Around, ...]:
    """What wraps ``module``'s forward, outermost first."""
    return module.__dict__.get("_around", ())


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class a module had before its forward was wrapped (and before FSDP2 gave it another)."""
    return next((cls.__dict__["_wraps"] for cls in type(module).__mro__ if "_wraps" in cls.__dict__), type(module))


@cache
def _wrapped(cls: Any) -> Any:
    @wraps(cls.forward)  # transformers reads a model's arguments off its signature
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        state = self.__dict__
        innermost = state["_own_forward"] or cls.forward.__get__(self)
        return run_in(self, state["_around"], innermost, args, kwargs)

    def reduce(self: nn.Module, protocol: Any) -> Any:
        # The subclass is made at run time: rebuild it from the original class.
        return _rebuild, (cls,), self.__dict__

    names = {
        **{name: _method(cls, name) for name in METHODS if hasattr(cls, name)},
        "_wraps": cls,
        "forward": forward,
        "__reduce_ex__": reduce,
        "__module__": cls.__module__,
        "__doc__": cls.__doc__,
    }
    wrapped: type[nn.Module] = type(cls.__name__, (cls,), names)
    wrapped.__qualname__ = cls.__qualname__
    return wrapped


def _method(cls: Any, name: str) -> Any:
    @wraps(getattr(cls, name))
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        state = self.__dict__
        innermost = state["_own_methods"].get(name) or getattr(cls, name).__get__(self)
        return run_in(self, state["_around_methods"].get(name, ()), innermost, args, kwargs)

    return method


def _rebuild(cls: type[nn.Module]) -> nn.Module:
    wrapped = _wrapped(cast(Any, cls))
    return wrapped.__new__(wrapped)


def run_in(
    module: nn.Module, chain: tuple[Around, ...], innermost: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """``innermost`` of ``module``, with ``chain`` around it, outermost first."""
    if not chain:
        return innermost(*args, **kwargs)

    def rest(*args: Any, **kwargs: Any) -> Any:
        return run_in(module, chain[1:], innermost, args, kwargs)

    return chain[0](module, rest, args, kwargs)


@contextmanager
def parameters_as(module: nn.Module, tensors: dict[str, Tensor]) -> Iterator[None]:
    """``module.<name>`` is ``tensors[name]`` inside."""
    registered: dict[str, Any] = module._parameters
    before = {name: registered[name] for name in tensors}
    registered.update(tensors)
    try:
        yield
    finally:
        registered.update(before)


def local_parameters(module: nn.Module) -> dict[str, Tensor]:
    """The module's own parameters as this rank's local tensors, differentiable.

    Raises:
        PlanError: FSDP2 has not gathered them.
    """
    summed = module.__dict__.get("_summed_parameters")  # set by styles.gradient_sum
    local: dict[str, Any] = {}
    for name, param in cast(dict[str, Any], module._parameters).items():
        if isinstance(param, DTensor):
            if param.device_mesh.ndim > 1:
                raise PlanError(
                    f"{original_class(module).__name__} runs while its {name} is not gathered: the FSDP2 unit that it "
                    "is in does not run. Call the parallelized model itself, not a part of it."
                )
            local[name] = summed.local(param) if summed is not None and name in summed.names else param.to_local()
        elif param is not None:
            local[name] = param  # its unit has made it local
    return local


def all_local_parameters(module: nn.Module) -> dict[str, Tensor]:
    """The same of ``module`` and all modules inside of it, by the names that ``named_parameters`` gives them."""
    return {
        f"{name}.{own}" if name else own: tensor
        for name, part in module.named_modules()
        for own, tensor in local_parameters(part).items()
    }


@contextmanager
def all_parameters_as(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Parameters of ``module`` and of modules inside of it, by such names, are these inside."""
    owners: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        owner, _, own = name.rpartition(".")
        owners.setdefault(owner, {})[own] = tensor
    with ExitStack() as inside:
        for owner, its in owners.items():
            inside.enter_context(parameters_as(module.get_submodule(owner), its))
        yield


@contextmanager
def attributes_as(module: nn.Module, values: dict[str, Any]) -> Iterator[None]:
    """Plain attributes of ``module`` have these values inside."""
    before = {name: module.__dict__[name] for name in values}
    module.__dict__.update(values)
    try:
        yield
    finally:
        module.__dict__.update(before)
