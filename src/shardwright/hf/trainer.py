"""transformers' ``Trainer``, and whatever is made of it, on a sharded model.

Private and protected parts of Trainer that are relied on are overridden here and nowhere else: how its accelerator is
made, how the model, the optimizer and the random states are written and read, and how large a batch is. Written for
transformers 5.17 to 5.23, tested with both and TRL 1.16.
"""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.trainer import SCHEDULER_NAME, TRAINING_ARGS_NAME, Trainer

from shardwright.distributed.apply.guards.fresh import Parallelized, parallelized_model
from shardwright.distributed.runtime.forward import original_class
from shardwright.distributed.runtime.optimizers import require_shardable
from shardwright.hf import checkpoints
from shardwright.hf.accelerator import adopt
from shardwright.hf.arguments import check_arguments
from shardwright.hf.gathering import plain
from shardwright.hf.random_states import load_random_states

_IGNORED = -100  # the label that losses leave out, in torch and transformers


class ShardedTrainer(Trainer):
    """A trainer that was given a sharded model; :func:`become_sharded` makes it one."""

    model: Any
    lr_scheduler: Any
    label_smoother: Any

    def finish_init(self) -> None:
        """Called at the end of ``Trainer.__init__``."""
        if self.label_smoother is not None:
            model = self.accelerator.unwrap_model(self.model)
            inner: Any = model
            while not isinstance(inner, PreTrainedModel) and list(inner.children()):
                inner = next(inner.children())  # what PEFT puts around a model has it as its only child
            causal = original_class(inner).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
            self.label_smoother = _LabelSmoother(self.label_smoother.epsilon, causal)

    def create_accelerator_and_postprocess(self) -> None:
        on = self._parallelized()
        check_arguments(self.args, on)
        super().create_accelerator_and_postprocess()
        adopt(self.accelerator, on)
        self.gather_function = partial(
            self.accelerator.gather_for_metrics, use_gather_object=self.args.eval_use_gather_object
        )

    def _parallelized(self) -> Parallelized:
        on = parallelized_model(self.model)
        assert on is not None
        return on

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if parallelized_model(model) is None:  # a sharded one is where its mesh is
            super()._move_model_to_device(model, device)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is not None:
            cls: Any = type(checkpoints.plain_optimizer(self.optimizer))
        else:
            cls, _ = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, self.model)
        require_shardable(cls)
        return super().create_optimizer(*(() if model is None else (model,)))

    # How large a batch is: to the accelerator, ranks that share a batch are one process.

    def get_tp_size(self) -> int:
        return 1

    def get_cp_size(self) -> int:
        return 1

    def get_sp_size(self) -> int:
        return 1

    def get_total_train_batch_size(self, args: Any) -> int:
        return self._train_batch_size * args.gradient_accumulation_steps * self.accelerator.num_processes

    # What a step returns

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        found = super().compute_loss(model, inputs, *args, **kwargs)
        return (plain(found[0]), *found[1:]) if isinstance(found, tuple) else plain(found)

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As on one process: the loss is that of the batch of all data-parallel ranks together."""
        inputs = self._without_fillers(inputs)
        loss, *rest = super().prediction_step(model, inputs, *args, **kwargs)
        if loss is not None:
            loss = self.accelerator.reduce(loss, "mean")
        return (loss, *plain(rest))

    def _without_fillers(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Rows that only fill up the last batch, so that every rank has as many, do not count in the loss."""
        state, labels = self.accelerator.gradient_state, inputs.get("labels")
        if not (state.end_of_dataloader and state.remainder > 0 and self.model_accepts_loss_kwargs):
            return inputs
        if not isinstance(labels, torch.Tensor) or labels.is_floating_point():
            return inputs
        real = state.remainder - self.accelerator.process_index * len(labels)
        filler = torch.arange(len(labels), device=labels.device) >= real
        rows = filler.view(-1, *[1] * (labels.ndim - 1))
        return {**inputs, "labels": labels.masked_fill(rows, _IGNORED)}

    # Checkpoints: every rank takes part

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        self._save(output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir or "")
        checkpoints.save_model(self.model, folder)
        if not self.args.should_save:
            return
        tokenizer = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        torch.save(self.args, folder / TRAINING_ARGS_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        checkpoints.load_model(self.model if model is None else model, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        checkpoints.load_model(self.model, Path(self.state.best_model_checkpoint))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        checkpoints.save_optimizer(self.model, self.optimizer, Path(output_dir), self._parallelized())
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not checkpoints.load_optimizer(self.model, self.optimizer, Path(checkpoint)):
            return
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_random_states(Path(checkpoint), self._parallelized(), super()._load_rng_state)


class _LabelSmoother:
    """Trainer's, by torch's own cross entropy, which runs on logits that are sharded on the vocabulary.

    Trainer asks for shifted labels by the name of the model's class, which FSDP2 puts a prefix before.
    """

    def __init__(self, epsilon: float, causal: bool) -> None:
        self.epsilon = epsilon
        self._causal = causal

    def __call__(self, output: Any, labels: Tensor, shift_labels: bool = False, num_items_in_batch: Any = None) -> Any:
        logits = output["logits"] if isinstance(output, dict) else output[0]
        if self._causal or shift_labels:
            logits, labels = logits[..., :-1, :], labels[..., 1:]
        loss = nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]),
            labels.reshape(-1),
            ignore_index=_IGNORED,
            reduction="sum",
            label_smoothing=self.epsilon,
        )
        counted = (labels != _IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        return loss / counted


def become_sharded(trainer: Trainer) -> None:
    """Give ``trainer``, which is about to be made, the methods of ShardedTrainer before those of its class."""
    cls: Any = type(trainer)
    trainer.__class__ = _sharded(cls)


@cache
def _sharded(cls: Any) -> Any:
    if issubclass(cls, ShardedTrainer):
        return cls
    return type(cls.__name__, (ShardedTrainer, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__})
