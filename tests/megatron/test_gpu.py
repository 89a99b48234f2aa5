"""The same trainings on NCCL: as many ranks as there are GPUs, one will do. Run with ``make test-gpu``."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from training import Case, Difference, compare, gradients

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
STRATEGIES = ("no_shard", "optim", "optim_grads", "optim_grads_params")


def _serve(rank: int, size: int, store: str, results: Any, function: Callable[..., Any], calls: list[Any]) -> None:
    torch.cuda.set_device(rank)
    torch.backends.cuda.matmul.allow_tf32 = False
    dist.init_process_group(
        "nccl", init_method=f"file://{store}", rank=rank, world_size=size, device_id=torch.device("cuda", rank)
    )
    found = [function(*call) for call in calls]
    if rank == 0:
        results.put(found)
    dist.barrier()
    dist.destroy_process_group()


def on_gpus(function: Callable[..., Any], calls: list[Any]) -> list[Any]:
    """What rank 0 gets from each of the ``calls`` of ``function``."""
    size = torch.cuda.device_count()
    results = mp.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        context = mp.spawn(_serve, args=(size, f"{folder}/store", results, function, calls), nprocs=size, join=False)
        found = results.get() if _first_result(context, results) else []
        while not context.join():
            pass
    return found


def _first_result(context: Any, results: Any) -> bool:
    """Wait until there is a result; raises what ended a rank before that."""
    while results.empty():
        if context.join(timeout=1):
            return not results.empty()
    return True


def tensor_parallel_sizes() -> list[int]:
    return [1, 2] if torch.cuda.device_count() % 2 == 0 else [1]


def test_steps() -> None:
    cases = []
    for strategy in STRATEGIES:
        for tp in tensor_parallel_sizes():
            options = {"data_parallel_sharding_strategy": strategy}
            cases += [
                Case(options, tp=tp),
                Case(options, tp=tp, optimizer="bare", accumulation=2, clip=0.5, set_to_none=False),
                Case(options, tp=tp, optimizer="attached", accumulation=2, tied=True, frozen=True, inner=True),
                Case({**options, "overlap_grad_reduce": False, "overlap_param_gather": False}, tp=tp, accumulation=2),
                Case({**options, "grad_reduce_in_fp32": True, "preserve_fp32_weights": True}, tp=tp),
            ]
    cases.append(Case({"fsdp_double_buffer": True}, accumulation=2))
    found: list[Difference] = on_gpus(compare, [(case,) for case in cases])
    assert len(found) == len(cases)
    for case, difference in zip(cases, found, strict=True):
        assert difference.seen < 1e-5, case
        assert difference.parameters < 5e-5, case
        assert difference.moved > 1e-3, case


def test_gradients() -> None:
    calls = [(strategy, tp, "ours") for strategy in STRATEGIES for tp in tensor_parallel_sizes()]
    assert max(on_gpus(gradients, calls)) < 1e-5
