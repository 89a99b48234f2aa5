"""TRL's trainers on sharded models: every step is that of one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from trainer_runs import SIZES, arguments, assert_same, build, on_ranks, result
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from shardwright import ParallelConfig
from shardwright.errors import UnsupportedError
from shardwright.train.tokenizer import train_tokenizer
from shardwright.verify.ranks import RankPool
from shardwright.verify.tiny import randomize

Shard = Callable[[nn.Module], nn.Module]
WAYS = {"fsdp2": ParallelConfig(dp_shard=2), "tp + sp": ParallelConfig(tp=2, sequence_parallel=True)}
TOKENS = 281  # odd
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "and", "the", "answer", "is"]
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: "
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def tokenizer() -> PreTrainedTokenizerBase:
    made = train_tokenizer([" ".join(WORDS)] * 50, TOKENS)
    made.chat_template = TEMPLATE
    return made


def text(number: int, words: int) -> str:
    return " ".join(WORDS[(number * 7 + place * 3) % len(WORDS)] for place in range(words))


def conversations() -> Dataset:
    said = [
        [
            {"role": "user", "content": text(number, 2 + number % 3)},
            {"role": "assistant", "content": text(number + 1, 1 + number % 4)},
        ]
        for number in range(24)
    ]
    return Dataset.from_list([{"messages": messages} for messages in said])


def preferences() -> Dataset:
    return Dataset.from_list(
        [
            {"prompt": text(n, 3), "chosen": " " + text(n + 1, 1 + n % 3), "rejected": " " + text(n + 2, 2)}
            for n in range(24)
        ]
    )


def model() -> PreTrainedModel:
    return build(vocab_size=TOKENS, max_position_embeddings=256)


def judge() -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **{**SIZES, "vocab_size": TOKENS}, num_labels=1)
    made = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    randomize(made)
    return made.train()


def sft(shard: Shard, ranks: int, folder: Path, **changes: Any) -> dict[str, Any]:
    values = {"max_length": 32, "assistant_only_loss": True, "gradient_checkpointing": False, **changes}
    args = arguments(folder, ranks, SFTConfig, bf16=False, **values)
    trainer = SFTTrainer(shard(model()), args, train_dataset=conversations(), processing_class=tokenizer())
    trainer.train()
    return result(trainer)


def packed(shard: Shard, ranks: int, folder: Path) -> dict[str, Any]:
    return sft(shard, ranks, folder, packing=True, packing_strategy="bfd", padding_free=False, max_steps=2)


def checkpointed(shard: Shard, ranks: int, folder: Path) -> dict[str, Any]:
    return sft(shard, ranks, folder, gradient_checkpointing=True, max_steps=2)


def dpo(shard: Shard, ranks: int, folder: Path) -> dict[str, Any]:
    args = arguments(folder, ranks, DPOConfig, bf16=False, gradient_checkpointing=False, max_length=32)
    reference = model()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(0.9)
    trainer = DPOTrainer(
        shard(model()), shard(reference), args, train_dataset=preferences(), processing_class=tokenizer()
    )
    trainer.train()
    return result(trainer)


def dpo_of_adapters(shard: Shard, ranks: int, folder: Path) -> dict[str, Any]:
    args = arguments(folder, ranks, DPOConfig, bf16=False, gradient_checkpointing=False, max_length=32, max_steps=2)
    torch.manual_seed(5)
    adapted = get_peft_model(model(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    trainer = DPOTrainer(
        shard(adapted), shard(model()), args, train_dataset=preferences(), processing_class=tokenizer()
    )
    trainer.train()
    return result(trainer)


def reward(shard: Shard, ranks: int, folder: Path) -> dict[str, Any]:
    args = arguments(folder, ranks, RewardConfig, bf16=False, gradient_checkpointing=False, max_length=32)
    trainer = RewardTrainer(shard(judge()), args, train_dataset=preferences(), processing_class=tokenizer())
    trainer.train()
    return result(trainer)


def some_reward(completions: list[str], **_: Any) -> list[float]:
    return [float(sum(map(ord, completion)) % 101) for completion in completions]


def given(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """Completions of one's own, two different ones for a prompt, as TRL's ``rollout_func``."""
    ids = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
    completions = [[(ids[place][0] * (place % 2 + 2)) % TOKENS, 7 + place % 2, 9] for place in range(len(ids))]
    return {"prompt_ids": ids, "completion_ids": completions, "logprobs": None}


def grpo(shard: Shard, ranks: int, folder: Path, rollout: Any = None, **changes: Any) -> dict[str, Any]:
    args = arguments(
        folder, ranks, GRPOConfig, bf16=False, gradient_checkpointing=False, num_generations=2, max_completion_length=5,
        beta=0.0, max_steps=2, gradient_accumulation_steps=1, **changes,
    )  # fmt: skip
    prompts = Dataset.from_list([{"prompt": text(number, 3)} for number in range(24)])
    trainer = GRPOTrainer(
        shard(model()), some_reward, args, train_dataset=prompts, processing_class=tokenizer(), rollout_func=rollout
    )
    trainer.train()
    assert any(line["grad_norm"] > 0 for line in result(trainer)["history"])
    return result(trainer)


def rolled_out(shard: Shard, ranks: int, folder: Path) -> dict[str, Any]:
    return grpo(shard, ranks, folder, given)


CASES = {
    "sft": sft, "packed": packed, "checkpointed": checkpointed, "dpo": dpo, "dpo of adapters": dpo_of_adapters,
    "reward": reward,
}  # fmt: skip


def _all(shard: Shard, ranks: int, folder: Path) -> dict[str, dict[str, Any]]:
    return {name: run(shard, ranks, folder / name) for name, run in CASES.items()}


def test_every_step(ranks2: RankPool, tmp_path: Path) -> None:
    wanted = _all(lambda model: model, 1, tmp_path)
    for way, config in WAYS.items():
        for found in ranks2.run(on_ranks, _all, config, tmp_path):
            for name, result_ in wanted.items():
                print(way, name)  # shown where it fails
                assert_same(found[name], result_)


def _refused(shard: Shard, ranks: int, folder: Path) -> str:
    with pytest.raises(UnsupportedError) as caught:
        rolled_out(shard, ranks, folder)
    return str(caught.value)


def test_generations(ranks2: RankPool, tmp_path: Path) -> None:
    """GRPO: exact on data-parallel ranks, refused where ranks share a batch."""
    assert_same(
        ranks2.run(on_ranks, rolled_out, WAYS["fsdp2"], tmp_path)[0], rolled_out(lambda model: model, 1, tmp_path)
    )
    found = ranks2.run(on_ranks, _refused, WAYS["tp + sp"], tmp_path)
    assert found[0] == found[1]
    assert "dp_shard" in found[0]
