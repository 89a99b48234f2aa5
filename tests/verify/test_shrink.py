"""Tiny configs keep what makes an architecture what it is."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import (
    CONFIG_MAPPING,
    DeepseekV3Config,
    Gemma3nTextConfig,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2VLConfig,
    Qwen3Config,
    Qwen3NextConfig,
)

from shardwright.errors import ConfigError
from shardwright.verify.images import image_batches
from shardwright.verify.layers import LayerChoice
from shardwright.verify.shrink import FIRST_FREE_ID, VOCABULARY, shrink
from shardwright.verify.source import load_config
from shardwright.verify.stages import ShrinkError
from shardwright.verify.tiny import build, model_class, shrunk_config, text_batch, text_batches


class Stubborn(LlamaConfig):
    model_type = "stubborn"

    def __post_init__(self, **kwargs) -> None:
        super().__post_init__(**kwargs)
        if self.hidden_size != 512:
            raise ValueError("512 or nothing")


def tiny(config: PreTrainedConfig, tp: int = 2) -> PreTrainedConfig:
    return shrunk_config(config, tp)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "small"), [(32, 32, (4, 4)), (32, 8, (4, 2)), (32, 1, (4, 1)), (20, 5, (4, 1))]
)
def test_the_nature_of_the_heads_stays(heads: int, kv_heads: int, small: tuple[int, int]) -> None:
    config = tiny(LlamaConfig(num_attention_heads=heads, num_key_value_heads=kv_heads, hidden_size=64 * heads))
    assert (config.num_attention_heads, config.num_key_value_heads) == small


def test_heads_stay_divisible_by_tp_or_stay_as_they_are() -> None:
    config = LlamaConfig(num_attention_heads=64, num_key_value_heads=8, hidden_size=8192)
    assert (tiny(config, tp=8).num_attention_heads, tiny(config, tp=8).num_key_value_heads) == (16, 8)
    odd = tiny(LlamaConfig(num_attention_heads=71, num_key_value_heads=71, hidden_size=71 * 64))
    assert odd.num_attention_heads == 71
    assert odd.hidden_size % 71 == 0


def test_heads_wider_than_the_stream_stay_wider() -> None:
    wide = tiny(Qwen3Config(hidden_size=2560, num_attention_heads=32, num_key_value_heads=8, head_dim=128))
    assert wide.num_attention_heads * wide.head_dim > wide.hidden_size


def test_ties_biases_and_options_stay() -> None:
    config = tiny(LlamaConfig(tie_word_embeddings=True, attention_bias=True, attention_dropout=0.1, use_cache=True))
    assert config.tie_word_embeddings
    assert config.attention_bias
    assert config.attention_dropout == 0.0
    assert not config.use_cache


def test_one_layer_of_every_kind_is_kept() -> None:
    types = ["linear_attention"] * 3 + ["full_attention"]
    config = tiny(Qwen3NextConfig(num_hidden_layers=48, layer_types=types * 12))
    assert config.layer_types == ["linear_attention", "full_attention"]
    assert config.num_hidden_layers == 2


def test_first_dense_layers_stay_first() -> None:
    config = tiny(DeepseekV3Config(num_hidden_layers=61, first_k_dense_replace=3, n_group=8, topk_group=4))
    assert config.num_hidden_layers == 2
    assert config.first_k_dense_replace == 1
    assert config.n_routed_experts % config.n_group == 0
    assert config.head_dim == config.qk_rope_head_dim


def test_layers_that_share_key_values_are_a_kind_of_their_own() -> None:
    config = tiny(Gemma3nTextConfig())
    layers, shared = config.num_hidden_layers, config.num_kv_shared_layers
    assert layers <= 6
    assert (
        set(config.layer_types[:-shared])
        == set(config.layer_types[-shared:])
        == {"sliding_attention", "full_attention"}
    )
    assert len(config.intermediate_size) == len(config.activation_sparsity_pattern) == layers
    assert set(config.activation_sparsity_pattern) == {0.95, 0.0}


def test_lists_of_layer_numbers_are_renumbered() -> None:
    choice = LayerChoice.of(
        {"num_hidden_layers": 12, "cross_attention_layers": [3, 8], "rates": [0.1 * i for i in range(12)]}
    )
    assert choice.kept == (0, 3)
    assert choice.changes["cross_attention_layers"] == [1]
    assert len(choice.changes["rates"]) == 2


def test_token_ids_stay_distinct_and_inside_the_vocabulary() -> None:
    ids = {"bos_token_id": 128000, "eos_token_id": [128001, 128009], "pad_token_id": 0}
    small = shrink({"vocab_size": 128256, **ids, "text_config": {"eos_token_id": 128001}})
    flat = [small["bos_token_id"], *small["eos_token_id"]]
    assert len(set(flat)) == 3
    assert all(FIRST_FREE_ID <= token < VOCABULARY for token in flat)
    assert small["text_config"]["eos_token_id"] == small["eos_token_id"][0]
    assert small["pad_token_id"] == 0


def test_rotary_sections_fill_the_head() -> None:
    text = tiny(Qwen2VLConfig()).text_config
    assert sum(text.rope_parameters["mrope_section"]) == text.hidden_size // text.num_attention_heads // 2


def test_a_tiny_model_is_not_degenerate_and_always_the_same() -> None:
    config = tiny(LlamaConfig())
    first, second = build(config), build(config)
    for (name, one), other in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other), name
        assert one.std() > 0.01, name
    assert not torch.equal(text_batch(0)["input_ids"], text_batch(1)["input_ids"])
    assert first.training


def test_images_reach_the_vision_tower() -> None:
    model = build(tiny(load_config("qwen2_vl")))
    batches = image_batches(model)
    assert batches is not None
    model(**batches(0)).loss.backward()
    assert model.model.visual.patch_embed.proj.weight.grad.abs().max() > 0
    assert image_batches(build(tiny(LlamaConfig()))) is None


# What their forwards ask for beside ids and pixels; Kosmos' images take places that no token id marks.
IMAGES = {
    "blip-2": {"input_ids", "pixel_values"},
    "instructblipvideo": {"input_ids", "pixel_values", "qformer_input_ids"},
    "kosmos-2": {"input_ids", "pixel_values", "image_embeds_position_mask"},
    "idefics": {"input_ids", "pixel_values", "image_attention_mask"},
    "pix2struct": {"decoder_input_ids", "flattened_patches"},
    "vision-encoder-decoder": {"decoder_input_ids", "pixel_values"},
}


@pytest.mark.parametrize("model_type", IMAGES)
def test_images_come_with_what_a_forward_asks_for(model_type: str) -> None:
    if transformers.__version__.startswith("5.17.") and model_type == "vision-encoder-decoder":
        pytest.skip("in this version of transformers its default config is not valid")
    model = build(tiny(load_config(model_type)))
    batches = image_batches(model)
    assert batches is not None
    assert batches(0).keys() == IMAGES[model_type] | {"labels"}
    other = {**batches(0), batches.images[0]: batches(1)[batches.images[0]]}
    assert model(**batches(0))["loss"] != model(**other)["loss"]  # the images count


@pytest.mark.parametrize(("model_type", "argument"), [("molmo2", "mm_token_type_ids"), ("udop", "bbox")])
def test_text_comes_with_what_a_forward_asks_for(model_type: str, argument: str) -> None:
    if model_type not in CONFIG_MAPPING:
        pytest.skip("this version of transformers does not have it")
    config = tiny(load_config(model_type))
    batch = text_batches(config)(0)
    assert argument in batch
    assert build(config)(**batch)["loss"].isfinite()


def test_bad_input_is_one_clear_error(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"There is no config\.json in"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "no_such_type"}')
    with pytest.raises(ConfigError, match="transformers cannot read the model config in"):
        load_config(tmp_path / "config.json")
    with pytest.raises(ConfigError, match="no language model for a"):
        model_class(load_config("clip"))
    with pytest.raises(ShrinkError, match="'stubborn' cannot be shrunk: ValueError: 512 or nothing"):
        tiny(Stubborn(hidden_size=512))


def test_a_checkpoint_folder_is_read(tmp_path) -> None:
    Qwen3Config(num_hidden_layers=7, tie_word_embeddings=True).save_pretrained(tmp_path)
    assert load_config(tmp_path).num_hidden_layers == 7
    assert load_config(tmp_path / "config.json").tie_word_embeddings


def test_rotary_shares_follow_the_parts_of_a_head() -> None:
    tiny = shrink(load_config("mistral4").to_dict())
    assert tiny["head_dim"] * tiny["rope_parameters"]["partial_rotary_factor"] == tiny["qk_rope_head_dim"]


def test_routed_experts_without_a_top_k_get_one() -> None:
    assert shrink(load_config("deepseek_v2").to_dict())["num_experts_per_tok"] == 2
