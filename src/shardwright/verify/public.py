"""``verify``: the whole proof in one call."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from shardwright import api
from shardwright.distributed.apply import megatron_fsdp
from shardwright.distributed.config import ParallelConfig
from shardwright.distributed.mesh import default_device_type
from shardwright.verify import shared_gpu
from shardwright.verify.compare import Report
from shardwright.verify.images import ImageText, image_batches, vision_fields
from shardwright.verify.ranks import RankPool
from shardwright.verify.run import Case, Parallelize, run_case
from shardwright.verify.source import load_config
from shardwright.verify.stages import ShrinkError, Stage
from shardwright.verify.tiny import build, model_class, shrunk_config, text_batch, text_batches

Model = str | os.PathLike[str] | PreTrainedConfig | Callable[[], nn.Module]


def verify(
    model: Model,
    config: ParallelConfig,
    *,
    batch: Callable[[int], Mapping[str, Any]] | None = None,
    accumulate: int = 1,
    seed: int = 0,
    parallelize: Parallelize = api.parallelize,
    pool: RankPool | None = None,
    device: str = "cpu",
) -> Report:
    """Run a tiny copy of a model in one process and on ranks of this machine, and compare everything.

    The ranks are gloo ranks on the CPU. With ``device="cuda"`` they compute on the GPUs of this machine: over NCCL
    where there is one for each, else they share them (:mod:`shardwright.verify.shared_gpu`). ``engine: megatron_fsdp``
    runs on a GPU for each rank only.

    Both sides run a training loop: an evaluation, a step, an evaluation, a step. A step is ``accumulate`` micro-batches
    (the second: one) with plain ``loss.backward()``, stock ``torch.nn.utils.clip_grad_norm_`` and
    ``torch.optim.AdamW``; one more evaluation stands between the backward and the clipping of the first. Compared are
    the losses, the logits, the gradient of every parameter, the clipped norm and every parameter after the last step,
    in float32. Dropout is off in tiny copies; LayerDrop is on where the config has it, and draws its layers by
    micro-batch.

    Args:
        model: a checkpoint folder, a ``config.json``, a model type of transformers (``"qwen3"``) or a transformers
            config, of which a tiny copy is made; or a function, defined at the top level of a module, that builds
            your own (small) model on CPU with the same weights every time.
        config: how to spread it. ``dp_shard=-1`` counts as 1.
        batch: for your own model: makes the keyword arguments of one forward from the number of the micro-batch, all
            micro-batches with the same number of tokens. The model returns the loss, or a mapping with ``"loss"`` and
            perhaps ``"logits"``. Top level of a module, like ``model``.
        accumulate: micro-batches per data-parallel rank.
        seed: of weights and batches.
        parallelize: what is put to the test; another library's function can take the place of Shardwright's.
        pool: ranks to use (as many as the degrees multiply to); by default they are started and stopped here.
        device: ``"cpu"`` or ``"cuda"``: what both sides compute on, if no ``pool`` says it.

    Raises:
        ConfigError: there is no such model, its config cannot be shrunk, the pool has the wrong size, there is no GPU,
            or for Megatron-FSDP not one for every rank.
        UnsupportedError: an engine whose package or GPU is missing.
        ShardwrightError: the plan refused (the reason is the message).
    """
    case = case_of(model, config, batch=batch, accumulate=accumulate, seed=seed, parallelize=parallelize)
    if pool is not None:
        return run(case, pool)
    with RankPool(case.config.least_world_size, kind=_kind(case.config, device)) as own:
        return run(case, own)


def _kind(config: ParallelConfig, device: str) -> str:
    """Of the ranks, as :class:`RankPool` calls it."""
    if config.engine == "megatron_fsdp":
        megatron_fsdp.check_config(config, default_device_type())
        return "cuda"
    if device == "cpu":
        return "cpu"
    return "cuda" if torch.cuda.device_count() >= config.least_world_size else shared_gpu.BACKEND


def case_of(
    model: Model,
    config: ParallelConfig,
    *,
    batch: Callable[[int], Mapping[str, Any]] | None = None,
    accumulate: int = 1,
    seed: int = 0,
    parallelize: Parallelize = api.parallelize,
) -> Case:
    """What :func:`verify` runs, as data; the arguments are its own."""
    config = config.with_(dp_shard=config.least_dp_shard)
    if not isinstance(model, (str, os.PathLike, PreTrainedConfig)):
        return Case(model, batch or text_batch, config, accumulate, parallelize)
    tiny = shrunk_config(load_config(model), config.tp)
    model_class(tiny)  # says now that there is none
    make_batch = batch or images_of(tiny, seed) or text_batches(tiny, start=1000 * seed)
    return Case(partial(build, tiny, seed), make_batch, config, accumulate, parallelize)


def images_of(tiny: PreTrainedConfig, seed: int) -> ImageText | None:
    """Batches with images, if the model has a vision tower and a known way to feed it."""
    if vision_fields(tiny.to_dict()) is None:
        return None
    with Stage(ShrinkError, "The tiny model cannot be built"):
        return image_batches(build(tiny, seed), start=1000 * seed)


def run(case: Case, pool: RankPool, timeout: float | None = None) -> Report:
    """Run ``case`` on the ranks of ``pool``."""
    case.config.degrees(pool.world_size)
    return pool.run(run_case, case, timeout=timeout)[0]
