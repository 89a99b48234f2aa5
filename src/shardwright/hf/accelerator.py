"""accelerate's ``Accelerator`` for models that are sharded already.

To accelerate, the ranks that share a batch (tensor and context parallel) are one process: ``num_processes`` is the
number of data-parallel ranks and ``process_index`` this rank's place among them. Batches are dealt, values gathered and
schedules advanced by these. What is done once for all (``is_main_process``, files) goes by the global rank, as ever.

Tested with accelerate 1.15.
"""

from __future__ import annotations

import gc
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.scheduler import AcceleratedScheduler
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shardwright.distributed.apply.guards.fresh import Parallelized, parallelized_model
from shardwright.distributed.runtime.layout import whole
from shardwright.errors import ConfigError, UnsupportedError
from shardwright.hf.arguments import check_degrees
from shardwright.hf.checkpoints import load_model, load_optimizer, save_model, save_optimizer
from shardwright.hf.gathering import gather, gather_objects, plain, reduce

_ITS_OWN = {
    DistributedType.DEEPSPEED: "DeepSpeed",
    DistributedType.FSDP: "its own FSDP",
    DistributedType.MEGATRON_LM: "Megatron-LM",
}


class ShardedAccelerator(Accelerator):
    """An accelerator that was given a sharded model; :func:`adopt` makes it one."""

    _on: Parallelized
    _models: list[Any]
    _optimizers: list[Any]

    @property
    def num_processes(self) -> int:
        """Data-parallel ranks."""
        return 1 if self._on.batches is None else self._on.batches.size()

    @property
    def process_index(self) -> int:
        """This rank's place among the data-parallel ranks; the same on those that share a batch."""
        return 0 if self._on.batches is None else self._on.batches.get_local_rank()

    @property
    def dispatch_batches(self) -> bool | None:
        """Whether rank 0 alone reads the data; it does not know which ranks share a batch."""
        asked = super().dispatch_batches
        return asked if self.num_processes == dist.get_world_size() else bool(asked)

    def prepare_model(
        self, model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False
    ) -> nn.Module:
        """Autocast and compilation as they are asked for; nothing is put around a sharded model."""
        on = parallelized_model(model)
        if on is None:
            return super().prepare_model(model, device_placement, evaluation_mode)
        check_same_mesh(self._on, on)
        return super().prepare_model(model, device_placement=False, evaluation_mode=True)

    def prepare_data_loader(self, data_loader: Any, *args: Any, **kwargs: Any) -> Any:
        """A loader that deals batches to the data-parallel ranks."""
        if self.dispatch_batches and self.num_processes != dist.get_world_size():
            raise ConfigError(
                f"dispatch_batches=True deals a batch to each of the {dist.get_world_size()} ranks, but this model has "
                f"{self.num_processes} data-parallel ranks. Leave it out: every rank then reads its own batches."
            )
        return super().prepare_data_loader(data_loader, *args, **kwargs)

    def prepare_scheduler(self, scheduler: Any) -> Any:
        prepared = super().prepare_scheduler(scheduler)
        if type(prepared) is AcceleratedScheduler:
            prepared.__class__ = _Schedule
            prepared.processes = self.num_processes
        return prepared

    def _prepare_tp(self, *args: Any) -> Any:
        return args  # accelerate would put parameters of its own in place of the sharded ones

    def _prepare_device_mesh(self) -> None:
        return None  # loaders go by num_processes and process_index

    def clip_grad_norm_(self, parameters: Any, max_norm: float, norm_type: float = 2) -> Tensor:
        """The whole norm, as on one process."""
        found = super().clip_grad_norm_(parameters, max_norm, norm_type)
        return whole(found) if isinstance(found, Tensor) else found

    def gather(self, tensor: Any) -> Any:
        return gather(tensor, self._on.batches)

    def gather_for_metrics(self, input_data: Any, use_gather_object: bool = False) -> Any:
        """The values of all data-parallel ranks, without those that only filled up the last batch."""
        tensors = not use_gather_object and _all_tensors(input_data)
        if tensors:
            return super().gather_for_metrics(input_data, use_gather_object)
        data = gather_objects(input_data, self._on.batches)
        state = self.gradient_state
        return data[: state.remainder] if state.end_of_dataloader and state.remainder > 0 else data

    def reduce(self, tensor: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        return reduce(tensor, reduction, scale, self._on.batches)

    def pad_across_processes(self, tensor: Any, dim: int = 0, pad_index: int = 0, pad_first: bool = False) -> Any:
        return super().pad_across_processes(plain(tensor), dim, pad_index, pad_first)

    def get_state_dict(self, model: nn.Module, unwrap: bool = True) -> dict[str, Any]:
        """The whole weights on the CPU of the main process, and nothing on the others; every rank calls it."""
        if parallelized_model(model) is None:
            return super().get_state_dict(model, unwrap)
        state: dict[str, Any] = {}
        gathered: dict[int, Tensor] = {}
        for name, value in self.unwrap_model(model).state_dict(keep_vars=True).items():
            if id(value) not in gathered:  # tied weights stay one tensor
                full = whole(value.detach())
                gathered[id(value)] = full.to("cpu", copy=full is value) if self.is_main_process else full[:0]
            if self.is_main_process:
                state[name] = gathered[id(value)]
        return state

    def save_state(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> Any:
        """Every rank its part; models as plain folders, optimizers to go on at any mesh (``hf/checkpoints.py``)."""
        models, optimizers = self._models, self._optimizers
        self._models, self._optimizers = [], []
        try:
            folder = super().save_state(output_dir, *args, **kwargs)
        finally:
            self._models, self._optimizers = models, optimizers
        for number, model in enumerate(map(self.unwrap_model, models)):
            save_model(model, Path(folder) / f"model_{number}")
        for number, optimizer in enumerate(optimizers):
            save_optimizer(self._model_of(optimizer), optimizer, Path(folder) / f"optimizer_{number}", self._on)
        return folder

    def load_state(self, input_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Read what :meth:`save_state` wrote, on the same mesh or another.

        Raises:
            CheckpointError: it is of another model or optimizer; on every rank.
        """
        folder = Path(input_dir).expanduser() if input_dir is not None else self._newest_state()
        models, optimizers = self._models, self._optimizers
        self._models, self._optimizers = [], []
        try:
            super().load_state(str(folder), *args, **kwargs)
        finally:
            self._models, self._optimizers = models, optimizers
        for number, model in enumerate(map(self.unwrap_model, models)):
            load_model(model, folder / f"model_{number}")
        for number, optimizer in enumerate(optimizers):
            load_optimizer(self._model_of(optimizer), optimizer, folder / f"optimizer_{number}")

    def _newest_state(self) -> Path:
        if not self.project_configuration.automatic_checkpoint_naming:
            raise ConfigError("load_state was called without a folder. Pass the one that save_state was given.")
        found = list((Path(self.project_dir) / "checkpoints").glob("checkpoint_*"))
        if not found:
            raise ConfigError(f"{self.project_dir} has no checkpoints yet.")
        return max(found, key=lambda path: int(path.name.rpartition("_")[2]))

    def _model_of(self, optimizer: Any) -> nn.Module:
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for model in map(self.unwrap_model, self._models):
            if held <= {id(parameter) for parameter in model.parameters()}:
                return model
        raise ConfigError(
            "An optimizer holds parameters of no single model that this accelerator has prepared, so its state cannot "
            "be named. Make an optimizer for each model, and prepare them together."
        )


def adopt(accelerator: Accelerator, on: Parallelized) -> bool:
    """Make ``accelerator`` a :class:`ShardedAccelerator`; False where it is one already.

    Raises:
        ConfigError: it shards or wraps models by itself, was not started on the ranks of the model's mesh, or has dealt
            batches without the mesh.
        UnsupportedError: float16 with a gradient scaler; Megatron-FSDP.
    """
    if isinstance(accelerator, ShardedAccelerator):
        return False
    _check(accelerator, on)
    cls: Any = type(accelerator)
    accelerator.__class__ = _sharded(cls)
    vars(accelerator)["_on"] = on
    return True


def adopt_all(on: Parallelized) -> None:
    """Adopt the accelerators that this process has, so that they count the data-parallel ranks of ``on`` from now on.

    One that cannot be adopted says so when it is handed the model, if it ever is.
    """
    if AcceleratorState._shared_state:
        for each in gc.get_objects():
            if issubclass(type(each), Accelerator) and "state" in vars(each):
                with suppress(ConfigError, UnsupportedError):
                    adopt(each, on)


def check_all_sharded(model: nn.Module, on: Parallelized) -> None:
    """Raise ConfigError where ``model`` trains parameters beside a sharded model inside of it: ranks would differ."""
    if on.engine != "fsdp2" or on.mesh.size() == 1:
        return
    for name, param in model.named_parameters():
        if param.requires_grad and not isinstance(param, DTensor):
            raise ConfigError(
                f"{name} {tuple(param.shape)} is beside the sharded model that {type(model).__name__} has inside, so "
                "every rank would train one of its own. Put everything around the model first, and call parallelize "
                "on the whole."
            )


def check_same_mesh(one: Parallelized, other: Parallelized) -> None:
    """Raise ConfigError unless models on both are given the same batches."""
    if one.mesh != other.mesh:
        raise ConfigError(
            f"Two sharded models of one trainer are on different meshes, {one.mesh} and {other.mesh}. Make one mesh, "
            "mesh = shardwright.make_mesh(config), and pass it to both: parallelize(model, config, mesh)."
        )


def _check(accelerator: Accelerator, on: Parallelized) -> None:
    kind, world = accelerator.distributed_type, dist.get_world_size() if dist.is_initialized() else 1
    if kind in _ITS_OWN:
        raise ConfigError(
            f"accelerate is set up for {_ITS_OWN[kind]}, and the model is sharded by Shardwright already. Use one of "
            "them: leave out fsdp=, deepspeed= and such (and `accelerate launch --use_fsdp` or its like), or pass a "
            "model that is not parallelized."
        )
    if accelerator.state.num_processes != world:
        raise ConfigError(
            f"torch.distributed has {world} ranks, but accelerate sees {accelerator.state.num_processes}. Start the "
            "script with torchrun or accelerate launch; without GPUs, say so: TrainingArguments(use_cpu=True) or "
            "Accelerator(cpu=True)."
        )
    if on.engine != "fsdp2":
        raise UnsupportedError(
            f"accelerate and Trainer are not supported with the engine {on.engine} yet. Use engine='fsdp2', or a loop "
            "of your own: loss.backward() and the optimizer work as ever."
        )
    if accelerator.scaler is not None:
        raise UnsupportedError(
            "fp16 mixed precision scales the loss by gradients that each rank sees a part of. Use bf16=True "
            "(mixed_precision='bf16') or ParallelConfig(precision=...)."
        )
    check_degrees(accelerator.parallelism_config, on)
    if accelerator._dataloaders and (on.batches is None or on.batches.size() != world):
        raise ConfigError(
            "A data loader was prepared before the model, so its batches were dealt to all ranks; this model's mesh "
            "has ranks that share a batch. Prepare the model first, or everything at once: accelerator.prepare(model, "
            "optimizer, loader, scheduler)."
        )


@cache
def _sharded(cls: Any) -> Any:
    """``cls`` with the methods of ShardedAccelerator before its own."""
    if cls is Accelerator:
        return ShardedAccelerator
    return type(f"Sharded{cls.__name__}", (ShardedAccelerator, cls), {"__module__": cls.__module__})


class _Schedule(AcceleratedScheduler):
    """Advances by the data-parallel ranks with each step, as accelerate's does by all ranks."""

    processes: int

    def step(self, *args: Any, **kwargs: Any) -> None:
        once = self.split_batches or not self.step_with_optimizer or not self.gradient_state.sync_gradients
        if once or any(optimizer.step_was_skipped for optimizer in self.optimizers):
            super().step(*args, **kwargs)
            return
        for _ in range(self.processes):
            if self.scheduler._step_count <= getattr(self.scheduler, "total_steps", float("inf")):
                self.scheduler.step(*args, **kwargs)


def _all_tensors(data: Any) -> bool:
    if isinstance(data, (list, tuple)):
        return all(map(_all_tensors, data))
    if isinstance(data, dict):
        return all(map(_all_tensors, data.values()))
    return isinstance(data, torch.Tensor)
