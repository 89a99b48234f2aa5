"""Plans that people wrote for torch, torchtitan or Automodel, with torch's own style objects: exact as they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist
from steps import assert_same_step
from tiny_models import batch, build
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
)

from shardwright import ParallelConfig
from shardwright.distributed.parallelizer import _get_parallel_plan, fsdp2_strategy_parallelize
from shardwright.distributed.planning.tensor import plan_and_resolve
from shardwright.distributed.replay.reading import ModelReading
from shardwright.distributed.styles import make_style
from shardwright.distributed.styles.torch_styles import asks_for_sequence_parallel
from shardwright.verify.ranks import RankPool, shared_mesh

BLOCK = "model.layers.*"


def automodel_plan(sequence_parallel: bool) -> dict[str, ParallelStyle]:
    """Embedding gathered from rows, logits left sharded; with Shard(1) layouts when the sequence is split."""
    plan: dict[str, ParallelStyle] = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
        f"{BLOCK}.self_attn.q_proj": ColwiseParallel(),
        f"{BLOCK}.self_attn.k_proj": ColwiseParallel(),
        f"{BLOCK}.self_attn.v_proj": ColwiseParallel(),
        f"{BLOCK}.self_attn.o_proj": RowwiseParallel(),
        f"{BLOCK}.mlp.up_proj": ColwiseParallel(),
        f"{BLOCK}.mlp.gate_proj": ColwiseParallel(),
        f"{BLOCK}.mlp.down_proj": RowwiseParallel(),
        "lm_head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
    }
    if sequence_parallel:
        plan |= {
            "model.embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
            "model.norm": SequenceParallel(),
            f"{BLOCK}.input_layernorm": SequenceParallel(),
            f"{BLOCK}.self_attn.o_proj": RowwiseParallel(output_layouts=Shard(1)),
            f"{BLOCK}.post_attention_layernorm": SequenceParallel(),
            f"{BLOCK}.mlp.down_proj": RowwiseParallel(output_layouts=Shard(1)),
            "lm_head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Shard(-1), use_local_output=False),
        }
    return plan


def gathered_head(sequence_parallel: bool) -> dict[str, ParallelStyle]:
    return automodel_plan(sequence_parallel) | {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate()),
        "lm_head": ColwiseParallel(output_layouts=Replicate()),
    }


def only_the_mlp(sequence_parallel: bool) -> dict[str, ParallelStyle]:
    return {
        f"{BLOCK}.mlp.up_proj": ColwiseParallel(),
        f"{BLOCK}.mlp.gate_proj": ColwiseParallel(),
        f"{BLOCK}.mlp.down_proj": RowwiseParallel(output_layouts=Shard(1) if sequence_parallel else Replicate()),
    }


def strings_and_objects(sequence_parallel: bool) -> dict[str, Any]:
    return automodel_plan(False) | {
        f"{BLOCK}.self_attn.q_proj": "colwise",
        f"{BLOCK}.mlp.down_proj": make_style("rowwise"),
        "lm_head": "colwise_rep",
        "model.embed_tokens": "replicate",
    }


def torchtitan_plan(sequence_parallel: bool) -> dict[str, Any]:
    """With layouts at the boundaries of whole modules, DTensors inside the blocks, and norms split over heads."""
    whole = PrepareModuleInput(
        input_kwarg_layouts={"hidden_states": Shard(1)}, desired_input_kwarg_layouts={"hidden_states": Replicate()}
    )
    plan = automodel_plan(sequence_parallel) | {
        f"{BLOCK}.mlp": PrepareModuleInput(
            input_layouts=(Shard(1) if sequence_parallel else Replicate(),), desired_input_layouts=(Replicate(),)
        ),
        f"{BLOCK}.mlp.up_proj": ColwiseParallel(use_local_output=False),
        f"{BLOCK}.mlp.gate_proj": ColwiseParallel(use_local_output=False),
        "model": PrepareModuleOutput(output_layouts=(Replicate(),), desired_output_layouts=(Replicate(),)),
    }
    return plan | ({f"{BLOCK}.self_attn": whole} if sequence_parallel else {})


PLANS = (automodel_plan, gathered_head, only_the_mlp, strings_and_objects, torchtitan_plan)


def _torch_styles(families: list[str]) -> None:
    four = dist.get_world_size() == 4
    for family in families:
        for make in PLANS:
            for sequence_parallel in (False, True):
                config = ParallelConfig(tp=2, dp_shard=2 if four else 1)
                reference, model = build(family), build(family)
                names = [name for name, _ in model.named_parameters()]
                plan = make(sequence_parallel)
                # The flag and the layouts of the plan both ask for sequence parallelism; either is enough.
                flag = sequence_parallel and make not in (automodel_plan, torchtitan_plan)
                returned = fsdp2_strategy_parallelize(
                    model, shared_mesh(config), MixedPrecisionPolicy(), sequence_parallel=flag, tp_shard_plan=plan
                )
                assert returned is model
                assert [name for name, _ in model.named_parameters()] == names
                placement = model.model.layers[0].mlp.up_proj.weight.placements[-1]
                assert placement.is_shard(0)
                what = f"{family} {make.__name__} {'sp' if sequence_parallel else ''}"
                assert_same_step(model, reference, lambda m: m(**batch(0)).loss, what)
                logits = model(input_ids=batch(0)["input_ids"]).logits
                whole_head = make is gathered_head or make is only_the_mlp or make is strings_and_objects
                assert isinstance(logits, DTensor) is not whole_head, what


def test_torch_styles_without_data_parallelism(ranks2: RankPool) -> None:
    ranks2.run(_torch_styles, ["llama", "qwen3"])


def test_torch_styles_with_fsdp2(ranks4: RankPool) -> None:
    ranks4.run(_torch_styles, ["qwen2"])


def _split_only_when_asked() -> None:
    seen: list[int] = []
    for sequence_parallel in (False, True):
        model = build("llama")
        plan = automodel_plan(sequence_parallel)
        fsdp2_strategy_parallelize(model, shared_mesh(ParallelConfig(tp=2)), MixedPrecisionPolicy(), tp_shard_plan=plan)
        block = model.model.layers[0]
        block.post_attention_layernorm.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
        model(**batch(0))
    assert seen == [15, 8 if dist.get_rank() == 0 else 7]


def test_layouts_alone_ask_for_sequence_parallelism(ranks2: RankPool) -> None:
    ranks2.run(_split_only_when_asked)


@pytest.fixture
def plan_module(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_plans.py").write_text(
        "PLAN = {'model.layers.*.mlp.up_proj': 'colwise', 'model.layers.*.mlp.gate_proj': 'colwise',\n"
        "        'model.layers.*.mlp.down_proj': 'rowwise'}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return "my_plans.PLAN"


def _from_a_path(path: str) -> None:
    reference, model = build("llama"), build("llama")
    fsdp2_strategy_parallelize(model, shared_mesh(ParallelConfig(tp=2)), MixedPrecisionPolicy(), tp_shard_plan=path)
    assert_same_step(model, reference, lambda m: m(**batch(0)).loss, path)


def test_a_plan_at_a_dotted_path(ranks2: RankPool, plan_module: str) -> None:
    ranks2.run(_from_a_path, plan_module)


def test_a_norm_that_is_split_over_heads_is_no_sequence_parallelism() -> None:
    plan = automodel_plan(False) | {f"{BLOCK}.self_attn.{name}_norm": SequenceParallel(sequence_dim=2) for name in "qk"}
    assert not asks_for_sequence_parallel(plan.values())
    resolved = plan_and_resolve(ModelReading(build("qwen3")), plan, 2)[1]
    assert resolved.summed.keys() == {f"model.layers.{i}.self_attn.{name}_norm" for i in (0, 1) for name in "qk"}


def test_layouts_at_the_input_of_a_module_ask_for_sequence_parallelism() -> None:
    whole = PrepareModuleInput(input_layouts=(Shard(1), None), desired_input_layouts=(Replicate(), None))
    assert asks_for_sequence_parallel([whole])
    assert not asks_for_sequence_parallel(
        [PrepareModuleOutput(output_layouts=Shard(1), desired_output_layouts=Shard(1))]
    )


def test_a_plan_that_was_returned_for_sequence_parallelism_asks_for_it() -> None:
    for family in ("llama", "phi3"):
        assert asks_for_sequence_parallel(_get_parallel_plan(build(family), sequence_parallel=True).values())
        assert not asks_for_sequence_parallel(_get_parallel_plan(build(family)).values())


SPLIT = automodel_plan(sequence_parallel=True)


def _split_by_a_plan_at_a_path() -> None:
    model, mesh = build("llama"), shared_mesh(ParallelConfig(tp=2))
    fsdp2_strategy_parallelize(model, mesh, MixedPrecisionPolicy(), tp_shard_plan="test_custom_plans.SPLIT")
    seen: list[int] = []
    norm = model.model.layers[0].post_attention_layernorm
    norm.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    assert_same_step(model, build("llama"), lambda m: m(**batch(0)).loss, "a path")
    assert seen == [8 if dist.get_rank() == 0 else 7]


def test_layouts_at_a_dotted_path_ask_for_sequence_parallelism(ranks2: RankPool) -> None:
    ranks2.run(_split_by_a_plan_at_a_path)
