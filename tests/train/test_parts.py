"""The small parts: schedule, optimizer groups, the drawn curve, atomic folders, the tokenizer, the model's config."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from shardwright.errors import ConfigError, UnsupportedError
from shardwright.train.check import Reference, _worst
from shardwright.train.config import TrainConfig
from shardwright.train.metrics import use_tensorboard
from shardwright.train.model import build_whole_model, check_fit, model_config
from shardwright.train.optim import make_optimizer
from shardwright.train.output import check_output
from shardwright.train.plot import curve
from shardwright.train.schedule import rate
from shardwright.train.sections import DataSettings, ModelSettings, OptimizerSettings, OutputSettings, TokenizerSettings
from shardwright.train.tokenizer import load_tokenizer, train_tokenizer

TINY = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1} | {
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def test_the_rate_warms_up_and_ends_where_it_should() -> None:
    rates = [rate(step, steps=11, warmup_steps=4, final_fraction=0.1) for step in range(11)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[7] == pytest.approx(0.55)  # half way down the cosine
    assert rates[-1] == pytest.approx(0.1)
    assert rate(0, steps=1, warmup_steps=0, final_fraction=0.1) == 1.0


def test_weight_decay_acts_on_matrices_only() -> None:
    model = nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 2), nn.LayerNorm(2))
    model[1].weight.requires_grad_(False)
    decayed, rest = make_optimizer(model, OptimizerSettings(weight_decay=0.5)).param_groups
    assert (decayed["weight_decay"], [p.shape for p in decayed["params"]]) == (0.5, [(3, 2)])
    assert (rest["weight_decay"], [p.shape for p in rest["params"]]) == (0.0, [(2,), (2,), (2,)])


def test_the_curve_falls_from_left_to_right() -> None:
    lines = curve([8.0, 6.0, 4.0, 2.0], width=8, height=4, ascii_only=True)
    assert lines[:4] == [
        "   8.00 |##      ",
        "        |####    ",
        "        |####    ",
        "   2.00 |######  ",
    ]
    assert curve([3.0] * 100, width=10)[-1].endswith("step 100")  # a flat curve divides by nothing


def write_half(folder: Path) -> None:
    (folder / "one").touch()
    (folder / "missing" / "two").touch()


def test_results_are_not_overwritten_unless_asked(tmp_path: Path) -> None:
    check_output(OutputSettings(dir=str(tmp_path / "new" / "run")))
    assert not (tmp_path / "new").exists()
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ConfigError, match=r"already holds the results of a run \(metrics\.jsonl\)"):
        check_output(OutputSettings(dir=str(tmp_path)))
    check_output(OutputSettings(dir=str(tmp_path), overwrite=True))
    with pytest.raises(ConfigError, match="is not a folder that can be written to"):
        check_output(OutputSettings(dir=str(tmp_path / "metrics.jsonl" / "run")))


def test_tensorboard_asked_for_and_missing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardwright.train.metrics.find_spec", lambda name: None)
    assert use_tensorboard(None) is False
    with pytest.raises(ConfigError, match="pip install"):
        use_tensorboard(True)


@pytest.mark.parametrize("of_gradients", [True, False])
def test_what_is_no_number_is_the_worst(of_gradients: bool) -> None:
    """Whatever is compared after it."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    gradients = {name: torch.ones_like(param) for name, param in model.named_parameters()}
    weights = {name: param.detach().clone() for name, param in model.named_parameters()}
    reference = Reference(1.0, gradients, weights, 1.0)
    for name, param in model.named_parameters():
        param.grad = gradients[name].clone()
    assert _worst(model, reference, of_gradients) == (0.0, "none")
    model[0].bias.data.fill_(math.nan)
    model[0].bias.grad.fill_(math.nan)
    assert _worst(model, reference, of_gradients) == (math.inf, "0.bias")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(["def first(a):\n    return a\n"] * 3, vocab_size=262)


def test_a_trained_tokenizer_spells_anything_and_reloads_equal(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    text = "def first(é):\n\treturn  日本 <x>\n"
    assert len(tokenizer) == 262
    assert tokenizer.decode(tokenizer.encode(text)) == text
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.encode(text) == tokenizer.encode(text)
    assert again.eos_token_id == tokenizer.eos_token_id is not None
    with pytest.raises(ConfigError, match=r"yields a tokenizer of \d+ tokens, fewer than tokenizer.vocab_size = 5000"):
        train_tokenizer(["short"], vocab_size=5000)


def test_a_folder_without_tokenizer_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no tokenizer"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(ConfigError, match="There is no folder"):
        load_tokenizer(str(tmp_path / "no"))


def test_a_config_takes_vocabulary_and_special_tokens_from_the_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    config = model_config(ModelSettings(config=dict(TINY)), tokenizer)
    assert (config.vocab_size, config.eos_token_id) == (262, tokenizer.eos_token_id)
    assert model_config(ModelSettings(config=TINY | {"vocab_size": 300}), tokenizer).vocab_size == 300


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hiden_size": 8}, "Unknown key 'model.config.hiden_size'. Did you mean 'hidden_size'?"),
        ({"model_type": "lama"}, "which transformers does not know. Did you mean llama"),
        ({"num_attention_heads": "two"}, "transformers refuses this llama config"),
    ],
)
def test_a_mistake_in_the_model_config_is_told(
    tokenizer: PreTrainedTokenizerBase, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        model_config(ModelSettings(config=TINY | changes), tokenizer)
    assert message in str(error.value)


def test_what_does_not_fit_the_model_is_told(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    config = model_config(ModelSettings(config=TINY | {"vocab_size": 100}), tokenizer)
    with pytest.raises(ConfigError, match="The tokenizer has 262 tokens, but the model's vocabulary is 100"):
        check_fit(config, tokenizer, sequence_length=8)
    config = model_config(ModelSettings(config=dict(TINY)), tokenizer)
    check_fit(config, tokenizer, sequence_length=64)
    with pytest.raises(ConfigError, match=r"data\.sequence_length is 65, but the model has 64 positions"):
        check_fit(config, tokenizer, sequence_length=65)
    with pytest.raises(UnsupportedError, match="vit is no causal language model"):
        model_config(ModelSettings(config={"model_type": "vit"}), tokenizer)
    with pytest.raises(ConfigError, match=r"no config\.json in the folder .* so it is no checkpoint"):
        model_config(ModelSettings(path=str(tmp_path)), tokenizer)


def test_a_checkpoint_is_loaded_whole_or_refused(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    settings = ModelSettings(config=dict(TINY))
    config = model_config(settings, tokenizer)

    def run(model: ModelSettings, seed: int) -> TrainConfig:
        return TrainConfig(model, DataSettings(("x",)), TokenizerSettings(vocab_size=300), seed=seed)

    model = build_whole_model(run(settings, 3), config)
    assert torch.equal(model.lm_head.weight, build_whole_model(run(settings, 3), config).lm_head.weight)
    assert not torch.equal(model.lm_head.weight, build_whole_model(run(settings, 4), config).lm_head.weight)

    model.save_pretrained(tmp_path)
    checkpoint = ModelSettings(path=str(tmp_path))
    loaded = build_whole_model(run(checkpoint, 0), model_config(checkpoint, tokenizer))
    assert loaded.training
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)

    state = model.state_dict()
    del state["model.norm.weight"]
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ConfigError, match=r"lacks 1 of the model's weights \(first: model\.norm\.weight\)"):
        build_whole_model(run(checkpoint, 0), config)
