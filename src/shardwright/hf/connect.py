"""The places where accelerate and transformers are handed a model, so that a sharded one is taken as it is.

A few methods are wrapped, once, when the first model of this process is parallelized. They do nothing for models that
are not sharded. Given a sharded one, the accelerator or trainer becomes an instance of a subclass of its own class (as
FSDP2 does with modules), which knows the mesh: :mod:`shardwright.hf.accelerator`, :mod:`shardwright.hf.trainer`.
No other class is touched, and none of the user's: trainers that are subclasses (TRL's, one's own) come through here.
PEFT refuses to put an adapter on a sharded model.

Written for transformers 5.17 to 5.23; tested with accelerate 1.15, PEFT 0.21 and transformers 5.23.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from accelerate import Accelerator
from torch import nn

from shardwright.distributed.apply.guards.fresh import Parallelized, parallelized_model
from shardwright.distributed.runtime.checked import CheckedDTensor
from shardwright.distributed.runtime.forward import original_class
from shardwright.errors import PlanError, UnsupportedError
from shardwright.hf.accelerator import adopt, adopt_all, check_all_sharded

logger = logging.getLogger(__name__)
_MARK = "_shardwright"


def connect(on: Parallelized) -> None:
    """Wrap these methods, once; tell the accelerators that are there of ``on``, so that they count its ranks."""
    if not hasattr(Accelerator.prepare, _MARK):
        _wrap_all()
    adopt_all(on)


def _wrap_all() -> None:
    _wrap(Accelerator, "prepare", _adopting)
    _wrap(Accelerator, "prepare_model", _adopting)
    for name, connect_module in _MODULES.items():
        if name in sys.modules:
            connect_module(sys.modules[name])
        else:  # they take seconds to import, and most processes never need them
            sys.meta_path.insert(0, _WhenImported(name, connect_module))


def _wrap(cls: type, name: str, wrapper: Callable[..., Any]) -> None:
    method = getattr(cls, name)

    @wraps(method)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        return wrapper(self, method, *args, **kwargs)

    setattr(wrapped, _MARK, True)
    setattr(cls, name, wrapped)


def _adopting(self: Accelerator, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    for each in args:
        on = parallelized_model(each) if isinstance(each, nn.Module) else None
        if on is None:
            continue
        check_all_sharded(each, on)
        if adopt(self, on):
            _warn_of_counts(self)
            return getattr(self, method.__name__)(*args, **kwargs)
    return method(self, *args, **kwargs)


def _warn_of_counts(accelerator: Any) -> None:
    """Say that an accelerator which was made after the model has counted other ranks until now."""
    if accelerator.num_processes < accelerator.state.num_processes and accelerator.is_main_process:
        logger.warning(
            "accelerator.num_processes is %d from here on, the data-parallel ranks; it was %d before, and a learning "
            "rate schedule that was made with that is too long. Make the Accelerator before parallelize is called.",
            accelerator.num_processes,
            accelerator.state.num_processes,
        )


def _connect_trainer(module: ModuleType) -> None:
    _wrap(module.Trainer, "__init__", _becoming_sharded)
    for name in ("train", "evaluation_loop"):
        _wrap(module.Trainer, name, _knowing_its_model)


def _connect_adapters(module: ModuleType) -> None:
    _wrap(module.PeftModel, "__init__", _putting_on)


def _connect_tuners(module: ModuleType) -> None:
    _wrap(module.BaseTuner, "inject_adapter", _putting_on)


def _putting_on(self: Any, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """PEFT puts an adapter on a model, which is the first argument of both methods."""
    model = args[0] if args else kwargs["model"]
    if any(isinstance(param, CheckedDTensor) for param in model.parameters()):
        raise PlanError(
            f"An adapter would be put on a {original_class(model).__name__} that is sharded already. It would be sized "
            "by this rank's part of each layer, and no other rank would share its gradient. Put all adapters on first, "
            "model = get_peft_model(model, config) (or PeftModel.from_pretrained, add_adapter, load_adapter, "
            "add_weighted_adapter), then model = parallelize(model, config), then make the optimizer."
        )
    return method(self, *args, **kwargs)


def _becoming_sharded(self: Any, method: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    trainer = import_module("shardwright.hf.trainer")
    model = args[0] if args else kwargs.get("model")
    if isinstance(model, nn.Module) and parallelized_model(model) is not None:
        trainer.become_sharded(self)
    method(self, *args, **kwargs)
    if isinstance(self, trainer.ShardedTrainer):
        self.finish_init()


def _knowing_its_model(self: Any, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    trainer = import_module("shardwright.hf.trainer")
    if parallelized_model(self.model) is not None and not isinstance(self, trainer.ShardedTrainer):
        raise UnsupportedError(
            f"This {type(self).__name__} was made before its model was sharded, or makes it itself (model_init), "
            "so it would deal batches and save as for a model in one piece. Call parallelize first, and pass what it "
            "returns: Trainer(model=parallelize(model, config), ...)."
        )
    return method(self, *args, **kwargs)


# What is wrapped in which module, once somebody imports it.
_MODULES: dict[str, Callable[[ModuleType], None]] = {
    "transformers.trainer": _connect_trainer,
    "peft.peft_model": _connect_adapters,
    "peft.tuners.tuners_utils": _connect_tuners,
}


class _WhenImported(MetaPathFinder, Loader):
    """Connects a module right after somebody has imported it."""

    def __init__(self, name: str, connect: Callable[[ModuleType], None]) -> None:
        self._name, self._connect = name, connect
        self._loader: Any = None

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != self._name:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None:
            self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        spec: Any = module.__spec__
        spec.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._connect(module)
