"""``nvfsdp_strategy_parallelize`` itself: all of its arguments, and what it says where it cannot work."""

from __future__ import annotations

import inspect
from dataclasses import asdict
from importlib.util import find_spec, module_from_spec
from typing import Any

import pytest
from test_training import check
from training import build_model

from shardwright.distributed import parallelizer
from shardwright.distributed.apply.megatron_fsdp import Options, availability
from shardwright.distributed.apply.megatron_fsdp.availability import installed
from shardwright.errors import UnsupportedError
from shardwright.verify.ranks import RankPool

UNITS = ["transformers.models.llama.modeling_llama.LlamaMLP", "transformers.models.llama.modeling_llama.LlamaAttention"]


def test_every_argument_reaches_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the 21, at another value than its default, arrives under its own name."""
    seen: list[Any] = []
    monkeypatch.setattr(parallelizer, "parallelize_with_megatron_fsdp", lambda *args: seen.extend(args))
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(parallelizer.nvfsdp_strategy_parallelize).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    own = {"optimizer": object(), "nvfsdp_unit_modules": ["a.B"], "tp_shard_plan": {"x": None}}
    others = {name: not value if isinstance(value, bool) else f"other {name}" for name, value in defaults.items()}
    given = {**others, **own}
    assert len(given) + 2 == 21
    model, mesh = build_model(), object()
    parallelizer.nvfsdp_strategy_parallelize(model, mesh, **given)
    options: Options = seen.pop(3)
    assert seen[:2] == [model, mesh]
    assert seen[3:] == [own["optimizer"], own["tp_shard_plan"]]
    arrived = asdict(options)
    assert arrived.pop("precision") is None
    assert arrived == {name: value for name, value in given.items() if name not in ("optimizer", "tp_shard_plan")}
    assert {name: value for name, value in asdict(Options()).items() if name in arrived} == {
        name: value for name, value in defaults.items() if name in arrived
    }


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(availability, "find_spec", lambda name: None)
    spec = find_spec(parallelizer.__name__)
    assert spec is not None
    assert spec.loader is not None
    fresh = module_from_spec(spec)
    spec.loader.exec_module(fresh)
    assert (fresh.HAVE_NVFSDP, parallelizer.HAVE_NVFSDP) == (False, True)
    model = build_model()
    before = list(model.parameters())
    for kind in (UnsupportedError, AssertionError, ValueError):
        with pytest.raises(kind, match=r"nvFSDP is not installed.*pip install 'shardwright\[megatron-fsdp\]'.* Or use"):
            fresh.nvfsdp_strategy_parallelize(model, CudaMesh())
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))


class CudaMesh:
    """All that is read of a mesh before the package is looked for."""

    device_type = "cuda"


def test_its_own_plan_and_checks(ranks4: RankPool) -> None:
    check(ranks4, tp=2, public=True, accumulation=2, clip=0.5)


def test_a_given_plan_and_other_names_of_axes(ranks4: RankPool) -> None:
    check(ranks4, "optim", tp=2, public=True, plan="torch", axes=("data", "context", "model"), tied=True)
    check(ranks4, "optim_grads", cp=2, public=True, axes=("data", "context", "model"), optimizer="bare")


def test_one_data_parallel_rank_without_an_optimizer(ranks2: RankPool) -> None:
    check(ranks2, tp=2, public=True, optimizer="bare", frozen=True, tied=True, accumulation=2)


def test_units_of_our_choice(ranks4: RankPool) -> None:
    check(ranks4, options={"nvfsdp_unit_modules": UNITS}, tp=2, public=True)


@pytest.mark.skipif(installed() < (0, 6), reason="refused with megatron-fsdp 0.5")
def test_double_buffers(ranks2: RankPool) -> None:
    check(ranks2, options={"fsdp_double_buffer": True}, accumulation=2, public=True, frozen=True)
