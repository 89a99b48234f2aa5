"""What the public functions that need no ranks answer: styles, plans, head checks, blocks."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, build
from torch import nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, SequenceParallel
from transformers import AutoConfig, AutoModelForImageTextToText, GPT2Config, GPT2LMHeadModel

from shardwright.distributed.parallelizer import (
    _get_parallel_plan,
    get_hf_tp_shard_plan,
    get_lm_ac_layers,
    translate_to_torch_parallel_style,
    validate_tp_mesh,
)
from shardwright.distributed.plan import match_names
from shardwright.errors import PlanError

# Every style string in the plans of transformers 5.23, expert parallelism's included, and the original module's five.
STYLES_OF_TRANSFORMERS = [
    "colwise",
    "rowwise",
    "colwise_gather_output",
    "rowwise_split_input",
    "packed_colwise",
    "packed_rowwise",
    "embedding_rowwise",
    "embedding_colwise",
    "replicated_with_grad_allreduce",
    "mla_kv_a_proj",
    "moe_tp_experts",
    "moe_identity_expert",
    "local_params",
    "all_reduce",
    "replicate",
    "ep_dispatch_experts",
    "grouped_gemm",
]
ORIGINAL = {
    "colwise": ColwiseParallel,
    "rowwise": RowwiseParallel,
    "colwise_rep": ColwiseParallel,
    "rowwise_rep": RowwiseParallel,
    "sequence_parallel": SequenceParallel,
}


class Mesh:
    """All that a head check asks of a mesh."""

    def __init__(self, size: int) -> None:
        self._size = size

    def size(self) -> int:
        return self._size


def multimodal(model_type: str = "gemma3") -> nn.Module:
    """Tiny, on meta; 4 query and 2 key-value heads in the text, 3 heads in the vision tower."""
    text = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 99,
    }  # fmt: skip
    vision = {
        "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 16,
        "patch_size": 8,
    }  # fmt: skip
    if model_type == "llava":
        text, vision = {"model_type": "llama", **text}, {"model_type": "clip_vision_model", **vision}
    with torch.device("meta"):
        config = AutoConfig.for_model(model_type, text_config=text, vision_config=vision)
        return AutoModelForImageTextToText.from_config(config)


# Styles


@pytest.mark.parametrize("style", [*STYLES_OF_TRANSFORMERS, *ORIGINAL])
def test_every_style_string_is_a_torch_style(style: str) -> None:
    made = translate_to_torch_parallel_style(style)
    assert isinstance(made, ParallelStyle)
    assert isinstance(made, ORIGINAL.get(style, ParallelStyle))


def test_gathering_styles_say_so() -> None:
    assert translate_to_torch_parallel_style("colwise_rep").output_layouts == (Replicate(),)
    assert translate_to_torch_parallel_style("rowwise_rep").input_layouts == (Replicate(),)


@pytest.mark.parametrize("style", ["colwize", "", "packed_colwise:0", "colwise:2", "packed_colwise:x"])
def test_an_unknown_style_lists_the_known(style: str) -> None:
    with pytest.raises(ValueError, match="Unknown parallel style") as caught:
        translate_to_torch_parallel_style(style)
    assert all(known in str(caught.value) for known in ("colwise", "rowwise_rep", "moe_tp_experts"))


@pytest.mark.parametrize("style", [3, None, ColwiseParallel()])
def test_a_style_that_is_no_string(style: Any) -> None:
    with pytest.raises((AssertionError, ValueError)):
        translate_to_torch_parallel_style(style)


# The Hugging Face plan


def test_hugging_face_plan_of_llama() -> None:
    plan = get_hf_tp_shard_plan(build("llama"))
    assert all(isinstance(style, ParallelStyle) for style in plan.values())
    assert {glob for glob, style in plan.items() if isinstance(style, ColwiseParallel)} == {
        *(f"model.layers.*.self_attn.{name}_proj" for name in "qkv"),
        *(f"model.layers.*.mlp.{name}_proj" for name in ("gate", "up")),
        "lm_head",
    }
    assert isinstance(plan["model.embed_tokens"], RowwiseParallel)  # added: transformers' plan leaves it whole
    assert plan["lm_head"].output_layouts == (Shard(-1),)
    assert plan["lm_head"].use_local_output is False


def test_class_then_instance_then_inner_plan_and_later_ones_win() -> None:
    model = build("llama")
    glob = "model.layers.*.mlp.up_proj"
    assert isinstance(get_hf_tp_shard_plan(model)[glob], ColwiseParallel)
    model._tp_plan = {glob: "replicate", "only_here": "rowwise"}
    model.model._tp_plan = {"layers.*.mlp.down_proj": "rowwise_rep"}
    plan = get_hf_tp_shard_plan(model)
    assert not isinstance(plan[glob], ColwiseParallel)
    assert isinstance(plan["only_here"], RowwiseParallel)
    model.model._tp_plan = {"layers.*.mlp.up_proj": "rowwise"}
    assert isinstance(get_hf_tp_shard_plan(model)[glob], RowwiseParallel)


def test_inner_text_model_of_a_multimodal_model() -> None:
    model = multimodal()
    plan = get_hf_tp_shard_plan(model)
    names = [name for name, _ in model.named_modules()]
    queries = [name for glob in plan for name in match_names(glob, names) if name.endswith("q_proj")]
    assert len(queries) == 3
    assert all("language_model" in name for name in queries)


@pytest.mark.parametrize("model", [nn.Linear(2, 2), GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2))])
def test_no_plan_names_the_model_and_what_to_do(model: nn.Module) -> None:
    with pytest.raises(
        AssertionError, match=rf"Hugging Face tp plan is not supported for {type(model).__name__}.*tp_shard_plan"
    ):
        get_hf_tp_shard_plan(model)


# Heads


@pytest.mark.parametrize("kinds", [(AssertionError,), (ValueError,), (PlanError,)])
def test_heads_that_do_not_divide(kinds: tuple[type[Exception], ...]) -> None:
    with pytest.raises(kinds, match=r"12 attention heads.*4 key-value.*tp=8.*up to 8 is 6\."):
        validate_tp_mesh(_stand_in(num_attention_heads=12, num_key_value_heads=4), Mesh(8))


def _stand_in(**config: Any) -> Any:
    """A model as code written for the original module's tests makes them: an object with a config, no more."""
    return SimpleNamespace(config=SimpleNamespace(**config))


@pytest.mark.parametrize(
    ("heads", "key_value", "size", "fits"),
    [(8, 8, 4, True), (8, 8, 1, True), (10, 10, 4, False), (8, 2, 4, True), (7, 7, 1, True), (7, 1, 2, False)],
)
def test_simple_stand_ins(heads: int, key_value: int, size: int, fits: bool) -> None:
    model = _stand_in(num_attention_heads=heads, num_key_value_heads=key_value)
    if fits:
        validate_tp_mesh(model, Mesh(size))
        return
    with pytest.raises(AssertionError, match=rf"{heads} attention heads.*tp={size}"):
        validate_tp_mesh(model, Mesh(size))


def test_a_stand_in_without_key_value_heads_or_without_a_config() -> None:
    validate_tp_mesh(_stand_in(num_attention_heads=8), Mesh(4))
    with pytest.raises(AssertionError):
        validate_tp_mesh(_stand_in(num_attention_heads=6), Mesh(4))
    validate_tp_mesh(nn.Linear(2, 2), Mesh(4))
    validate_tp_mesh(object(), Mesh(4))  # type: ignore[arg-type]


def test_heads_are_those_of_the_text_model() -> None:
    model = multimodal()
    validate_tp_mesh(model, Mesh(4))  # the vision tower's 3 heads are not cut
    with pytest.raises(PlanError, match="4 attention heads"):
        validate_tp_mesh(model, Mesh(3))
    nested = SimpleNamespace(num_attention_heads=6, num_key_value_heads=6)
    with pytest.raises(PlanError, match="6 attention heads"):
        validate_tp_mesh(_stand_in(text_config=nested), Mesh(4))


def test_heads_that_differ_by_layer() -> None:
    model = _stand_in(num_attention_heads=[8, 12, 4], num_key_value_heads=[4, 4, 2])
    validate_tp_mesh(model, Mesh(4))
    with pytest.raises(PlanError, match=r"12 attention heads.*is 4\."):
        validate_tp_mesh(model, Mesh(8))


def test_repeated_key_value_heads_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        validate_tp_mesh(build("llama"), Mesh(4))
    assert "2 key-value heads on 4" in caplog.text


# Blocks


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_of_text_models(family: str) -> None:
    model = build(family)
    assert [id(block) for block in get_lm_ac_layers(model)] == [id(block) for block in model.model.layers]


@pytest.mark.parametrize("model_type", ["gemma3", "llava"])
def test_blocks_of_text_model_and_vision_tower(model_type: str) -> None:
    blocks = get_lm_ac_layers(multimodal(model_type))
    kinds = [type(block).__name__ for block in blocks]
    assert len(kinds) == 5
    assert sum("Decoder" in kind for kind in kinds) == 3
    assert sum("Encoder" in kind for kind in kinds) == 2


def test_blocks_of_gpt2_and_of_a_custom_model() -> None:
    assert len(get_lm_ac_layers(GPT2LMHeadModel(GPT2Config(n_layer=3, n_embd=8, n_head=2)))) == 3
    custom = nn.Module()
    custom.front = nn.Linear(4, 4)
    custom.trunk = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)) for _ in range(5))
    assert get_lm_ac_layers(custom) == list(custom.trunk)


def test_blocks_in_a_sequential() -> None:
    blocks = [nn.TransformerEncoderLayer(8, 2) for _ in range(3)]
    model = nn.Sequential(nn.Embedding(9, 8), *blocks, nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 9)))
    assert get_lm_ac_layers(model) == blocks
    assert get_lm_ac_layers(nn.ModuleDict({"trunk": nn.Sequential(*blocks)})) == blocks


NO_BLOCKS = (
    nn.Linear(2, 2),
    nn.Module(),
    nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]),
    nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)),
    nn.Sequential(nn.Linear(2, 2), nn.TransformerEncoderLayer(2, 1)),
)


@pytest.mark.parametrize("model", NO_BLOCKS)
def test_no_blocks(model: nn.Module) -> None:
    assert get_lm_ac_layers(model) == []


# Which plan


CUSTOM = {"model.layers.*.mlp.up_proj": "colwise", "model.layers.*.mlp.down_proj": RowwiseParallel()}
NOT_A_PLAN = ["colwise"]


def make_custom() -> dict[str, Any]:
    return dict(CUSTOM)


def make_nothing() -> None:
    return None


@pytest.mark.parametrize(
    "given", [CUSTOM, f"{__name__}.CUSTOM", f"{__name__}.make_custom"], ids=["dict", "path", "call"]
)
def test_a_custom_plan_in_every_form(given: Any) -> None:
    plan = _get_parallel_plan(build("phi3"), tp_shard_plan=given)
    assert list(plan) == list(CUSTOM)
    assert isinstance(plan["model.layers.*.mlp.up_proj"], ColwiseParallel)
    assert isinstance(plan["model.layers.*.mlp.down_proj"], RowwiseParallel)


@pytest.mark.parametrize(
    "given",
    [
        f"{__name__}.NOT_A_PLAN",
        f"{__name__}.make_nothing",
        f"{__name__}.nothing_here",
        "no.such.module",
        "missing.yaml",
        {"model.norm": 3},
        {"model.norm": "colwize"},
        {3: "colwise"},
        3,
        [],
    ],
)
def test_bad_custom_plans_raise_and_no_other_source_is_tried(given: Any) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - of several kinds, whose messages name what was passed
        _get_parallel_plan(build("llama"), tp_shard_plan=given)
    if isinstance(given, str) and not given.endswith(".yaml"):
        assert str(caught.value).startswith(f"Custom parallel plan {given!r} is not valid")


def custom_net() -> nn.Module:
    """A model no library knows."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(16)
            self.up = nn.Linear(16, 32)
            self.down = nn.Linear(32, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.down(torch.relu(self.up(self.norm(x))))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(20, 16)
            self.blocks = nn.ModuleList(Block() for _ in range(2))

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            x = self.embed(input_ids)
            for block in self.blocks:
                x = block(x)
            return x

    return Net()


@pytest.mark.parametrize(
    ("make", "source", "expected"),
    [
        (lambda: build("phi3"), "optimized: phi3", "model.layers.*.self_attn.qkv_proj"),
        (lambda: build("llama"), "huggingface", "model.layers.*.self_attn.q_proj"),
        (custom_net, "dataflow", "blocks.*.up"),
    ],
    ids=["optimized", "huggingface", "dataflow"],
)
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_the_source_is_chosen_in_order_and_reported(
    caplog: pytest.LogCaptureFixture, make: Any, source: str, expected: str, sequence_parallel: bool
) -> None:
    with caplog.at_level(logging.INFO):
        plan = _get_parallel_plan(make(), sequence_parallel)
    assert expected in plan
    assert any(source in record.getMessage() for record in caplog.records)
    norms = [glob for glob, style in plan.items() if isinstance(style, SequenceParallel)]
    assert bool(norms) == sequence_parallel


def test_a_plan_that_was_returned_can_be_passed_in_again() -> None:
    model = build("qwen3")
    plan = _get_parallel_plan(model, sequence_parallel=True)
    again = _get_parallel_plan(model, tp_shard_plan=plan)
    assert list(again) == list(plan)
    assert [type(style) for style in again.values()] == [type(style) for style in plan.values()]


def test_the_config_is_never_edited() -> None:
    model = build("gemma2")
    before = model.config.to_dict()
    _get_parallel_plan(model, sequence_parallel=True)
    get_hf_tp_shard_plan(model)
    assert model.config.to_dict() == before
