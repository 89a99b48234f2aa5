"""What plans ``derive_plan`` finds, in one process."""

from __future__ import annotations

import resource
import time

import pytest
import torch
from handwritten import HANDWRITTEN, NanoAttention, NanoGPT, example
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSeq2SeqLM, LlamaConfig

from shardwright.distributed.plan import ParallelPlan
from shardwright.distributed.planning.derive import derive_plan
from shardwright.distributed.planning.resolve import resolve
from shardwright.distributed.planning.sources import huggingface_plan
from shardwright.distributed.replay.reading import ModelReading
from shardwright.verify.source import load_config
from shardwright.verify.tiny import build, shrunk_config

GATHERED = ("colwise_gather_output", "rowwise_split_input")
REGION_STYLES = ("colwise", "packed_colwise", "packed_colwise:3", "rowwise")


def on_meta(model_type: str, **settings: object) -> nn.Module:
    config = CONFIG_MAPPING[model_type](**settings)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"):
        return auto.from_config(config)


# Dense models whose code lets every layer run on this rank's heads and neurons: real sizes, from the default configs.
DENSE = {
    "gpt2": ("transformer.h.*", {"attn": ("split_size",)}),
    "opt": ("model.decoder.layers.*", {"self_attn": ("num_heads",)}),
    "gptj": ("transformer.h.*", {"attn": ("num_attention_heads",)}),
    "gpt_neox": ("gpt_neox.layers.*", {}),
    "bert": ("bert.encoder.layer.*", {}),
    "roberta": ("roberta.encoder.layer.*", {}),
    "stablelm": ("model.layers.*", {"self_attn": ("num_heads", "num_key_value_heads")}),
    "phi3": ("model.layers.*", {"self_attn": ("config.num_attention_heads", "num_key_value_heads")}),
    "xglm": ("model.layers.*", {"self_attn": ("embed_dim", "num_heads")}),
}


@pytest.mark.parametrize("model_type", DENSE)
def test_dense_models_run_on_slices_with_two_regions_a_block(model_type: str) -> None:
    block, attributes = DENSE[model_type]
    model = on_meta(model_type)
    plan = derive_plan(model)
    styles = {glob: style for glob, style in plan.styles.items() if glob.startswith(block)}
    assert set(styles.values()) <= set(REGION_STYLES), plan
    # Each rowwise layer ends a region: one forward and one backward reduction for each, four collectives in all.
    assert list(styles.values()).count("rowwise") == 2, plan
    linear = [
        name for name, m in model.named_modules() if name.startswith(block[:-1] + "0.") and "weight" in m._parameters
    ]
    matrices = [name for name in linear if model.get_submodule(name).weight.ndim == 2]
    assert len(styles) == len(matrices), plan
    assert plan.local_attributes == {f"{block}.{name}": value for name, value in attributes.items()}


def test_heads_fused_in_four_parts_run_on_slices() -> None:
    plan = derive_plan(
        on_meta("codegen", n_embd=128, n_head=16, rotary_dim=4, n_layer=2, n_positions=32, vocab_size=96)
    )
    assert plan.styles["transformer.h.*.attn.qkv_proj"] == "packed_colwise:12"
    assert plan.styles["transformer.h.*.attn.out_proj"] == "packed_rowwise:4"


def test_encoder_decoder_runs_on_slices() -> None:
    plan = derive_plan(on_meta("bart"))
    inner = {glob: style for glob, style in plan.styles.items() if ".layers." in glob}
    assert set(inner.values()) == {"colwise", "rowwise"}
    assert sorted(glob for glob, style in inner.items() if style == "rowwise") == [
        "model.decoder.layers.*.encoder_attn.out_proj",
        "model.decoder.layers.*.fc2",
        "model.decoder.layers.*.self_attn.out_proj",
        "model.encoder.layers.*.fc2",
        "model.encoder.layers.*.self_attn.out_proj",
    ]


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma3_text", "glm4", "cohere"])
def test_as_good_as_the_plan_of_transformers(model_type: str) -> None:
    model = on_meta(model_type, num_hidden_layers=7, vocab_size=512, pad_token_id=0)
    theirs = resolve(ModelReading(model), huggingface_plan(model), 2)
    ours = resolve(ModelReading(model), derive_plan(model), 2)
    differing = {
        name: (ours.modules[name].style, use.style)
        for name, use in theirs.modules.items()
        if ours.modules[name].style != use.style
    }
    # The same, or on slices where theirs gathers.
    worse = {name: pair for name, pair in differing.items() if pair[0] not in REGION_STYLES or pair[1] not in GATHERED}
    assert not worse


def test_mla_is_cut_by_heads() -> None:
    sizes = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "vocab_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16}
    parts = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "n_group": 1, "topk_group": 1}
    experts = {"moe_intermediate_size": 32, "n_routed_experts": 8}
    styles = derive_plan(on_meta("deepseek_v3", **sizes, **heads, **parts, **experts)).styles
    layer = "model.layers.*.self_attn"
    assert styles[f"{layer}.q_b_proj"] == styles[f"{layer}.kv_b_proj"] == "colwise"
    assert styles[f"{layer}.kv_a_proj_with_mqa"] == "mla_kv_a_proj"
    assert styles[f"{layer}.o_proj"] == "rowwise"


def test_heads_that_do_not_divide_are_gathered_not_refused() -> None:
    model = on_meta("gpt2", n_head=3, n_embd=96, n_layer=2)
    plan = derive_plan(model)
    assert plan.styles["transformer.h.*.attn.c_attn"] == "colwise_gather_output"
    assert plan.styles["transformer.h.*.mlp.c_fc"] == "colwise"
    assert derive_plan(model, tp=3).styles["transformer.h.*.attn.c_attn"] == "packed_colwise:3"


@pytest.mark.parametrize("name", HANDWRITTEN)
def test_handwritten_models(name: str) -> None:
    plan = derive_plan(HANDWRITTEN[name](), example(name))
    assert plan.styles == EXPECTED[name]
    assert plan.local_attributes == LOCAL.get(name, {})
    # The width of the input is the model's: attention code that reads it off there sees a rank's.
    assert plan.local_arguments == ({"h.*.attn": ("x:width",)} if name in ("nano", "mini") else {})


EXPECTED = {
    "computed": {
        "wte": "embedding_rowwise",
        "h.*.attn.q": "colwise",
        "h.*.attn.k": "colwise",
        "h.*.attn.v": "colwise",
        "h.*.attn.o": "rowwise",
        "h.*.mlp.0": "colwise",
        "h.*.mlp.2": "rowwise",
        "lm_head": "colwise_gather_output",
    },
    "nano": {
        "wte": "embedding_rowwise",
        "h.*.attn.c_attn": "packed_colwise:3",
        "h.*.attn.c_proj": "rowwise",
        "h.*.mlp.0": "colwise",
        "h.*.mlp.2": "rowwise",
        "lm_head": "colwise_gather_output",
    },
    "temple": {
        "runes": "embedding_rowwise",
        "choir.*": "local_params",
        "choir.*.ask": "colwise",
        "choir.*.hint": "colwise",
        "choir.*.gist": "colwise",
        "choir.*.tell": "rowwise",
        "choir.*.calm": "replicated_with_grad_allreduce",
        "choir.*.rise": "packed_colwise",
        "choir.*.sink": "rowwise",
        "choir.*.heat": "colwise",
        "verdict": "colwise_gather_output",
    },
    "vision": {
        "blocks.*.qkv": "packed_colwise:3",
        "blocks.*.proj": "rowwise",
        "blocks.*.fc1": "colwise",
        "blocks.*.fc2": "rowwise",
        "head": "rowwise_split_input",
    },
    "recurrent": {
        "embed": "embedding_rowwise",
        "layers.*.enter": "colwise_gather_output",  # a convolution mixes the channels
        "layers.*.leave": "colwise_gather_output",
        "layers.*.value": "colwise",
        "layers.*.forget": "colwise",
        "layers.*.back": "rowwise",
        "out": "colwise_gather_output",
    },
}
EXPECTED["mini"] = EXPECTED["nano"]
LOCAL = {
    "computed": {"h.*.attn": ("sizes.heads",)},
    "nano": {"h.*.attn": ("n_head",)},
    "mini": {"h.*.attn": ("n_embd", "n_head")},
    "temple": {"choir.*": ("scouts", "troops")},
    "vision": {"blocks.*": ("heads",)},
}


class Between(nn.Module):
    """Two layers with something between them."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        self.first, self.between, self.second = nn.Linear(16, 32), between, nn.Linear(32, 16)
        self.last = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.second(self.between(self.first(x)))
        return x + self.last(torch.relu(x))


class AlmostAlone(nn.Module):
    """Each feature on its own, but for a part in a thousand of the mean."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1e-3 * x.mean(-1, keepdim=True)


class Detached(nn.Module):
    """Mixes the features where autograd does not see it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (1 + x.detach().mean(-1, keepdim=True))


@pytest.mark.parametrize(
    "between",
    [nn.LayerNorm(32), nn.RMSNorm(32), nn.Softmax(-1), AlmostAlone(), Detached(), nn.Linear(32, 32)],
    ids=lambda m: type(m).__name__,
)
def test_what_mixes_features_does_not_run_on_slices(between: nn.Module) -> None:
    styles = derive_plan(Between(between), torch.randn(2, 5, 16)).styles
    assert (styles["first"], styles["second"]) != ("colwise", "rowwise")
    assert derive_plan(Between(nn.SiLU()), torch.randn(2, 5, 16)).styles["first"] == "colwise"


class Escapes(Between):
    """Another path takes the hidden features to the output."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.first(x))
        return self.second(hidden) + hidden.mean(-1, keepdim=True)


class Leaks(Between):
    """The stream enters the region beside the reader, so that its gradient would be partial."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(x + self.second(torch.relu(self.first(x)) * x.mean(-1, keepdim=True)))


class Shares(Between):
    """Another module uses a layer's weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.second(torch.relu(self.first(x)))
        return y + nn.functional.linear(x, self.first.weight).mean(-1, keepdim=True)


@pytest.mark.parametrize("cls", [Escapes, Leaks, Shares])
def test_regions_that_are_connected_elsewhere_stay_whole(cls: type[Between]) -> None:
    assert derive_plan(cls(nn.Identity()), torch.randn(2, 5, 16)).styles.get("first") != "colwise"


def test_405b_takes_seconds_and_no_memory() -> None:
    sizes = {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "vocab_size": 128256}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, num_attention_heads=128, num_key_value_heads=8))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several that wait for one another on a busy machine count as time, too
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    plan = derive_plan(model, tp=8)
    taken = time.process_time() - start
    torch.set_num_threads(threads)
    assert taken < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_500_000  # kB
    assert plan.styles["model.layers.*.self_attn.k_proj"] == "colwise"


def test_the_model_is_left_alone() -> None:
    model = on_meta("phi3", num_hidden_layers=2, hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
    before = [(name, type(m), dict(m.__dict__)) for name, m in model.named_modules()]
    config = model.config.to_dict()
    derive_plan(model)
    for (name, cls, state), (_, module) in zip(before, model.named_modules(), strict=True):
        assert type(module) is cls, name
        assert module.__dict__.keys() == state.keys(), name
    assert model.config.to_dict() == config
    assert all(param.is_meta for param in model.parameters())


def test_not_understood_is_an_empty_plan_with_a_reason() -> None:
    class Riddle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.layer(x) + y

    plan = derive_plan(Riddle())
    assert not plan.styles
    assert len(plan.notes) == 1
    assert "Riddle" in plan.notes[0]


def test_check_confirms_and_yaml_brings_it_back() -> None:
    model = NanoGPT()
    plan = derive_plan(model, check=True)
    assert plan == derive_plan(model)
    assert ParallelPlan.from_yaml(plan.to_yaml()) == plan


class ReadsMore(NanoAttention):
    """Uses the values of what it reads the width from."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * x.mean()


def test_a_width_is_not_made_local_where_the_values_are_used() -> None:
    class Model(NanoGPT):
        attention = ReadsMore

    plan = derive_plan(Model(), example("nano"))
    assert plan.styles["h.*.attn.c_attn"] == "colwise_gather_output"
    assert not plan.local_arguments


class TiedPieces(nn.Module):
    """Two tables whose vectors a layer mixes, one of them tied to the head: its rows are cut, not its features."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.shapes, self.mix = nn.Embedding(40, 16), nn.Embedding(20, 16), nn.Linear(32, 16)
        self.head = nn.Linear(16, 40, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.mix(torch.cat([self.words(ids), self.shapes(ids)], dim=-1))))


def test_a_table_that_is_tied_to_the_head_is_not_cut_by_features() -> None:
    model = TiedPieces()
    plan = derive_plan(model, torch.randint(20, (2, 5)))
    assert plan.styles["words"] == "embedding_rowwise"
    resolve(ModelReading(model), plan, 2)


class OnlyTrains(Between):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            raise RuntimeError("not made for inference")
        return super().forward(nn.functional.dropout(x, 0.0, self.training))


def test_a_model_that_runs_in_training_mode_only() -> None:
    model = OnlyTrains(nn.Sequential(nn.SiLU(), nn.Dropout(0.5)))
    assert derive_plan(model, torch.randn(2, 5, 16)).styles["first"] == "colwise"


def test_a_text_model_that_does_not_run_without_an_image() -> None:
    plan = derive_plan(build(shrunk_config(load_config("blip"))))
    assert plan.styles["text_decoder.bert.encoder.layer.*.crossattention.self.key"] == "colwise"
    assert plan.styles["vision_model.encoder.layers.*.mlp.fc2"] == "rowwise"
