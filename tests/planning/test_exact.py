"""Derived plans on real ranks: loss, logits and every gradient against one process."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from handwritten import HANDWRITTEN, example
from torch import nn
from torch.distributed.tensor.debug import CommDebugMode
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from shardwright import parallelize
from shardwright.distributed.apply.tensor_parallel import apply_tensor_parallel
from shardwright.distributed.config import ParallelConfig
from shardwright.distributed.plan import ParallelPlan
from shardwright.distributed.planning.derive import derive_plan
from shardwright.distributed.planning.resolve import resolve
from shardwright.distributed.replay.reading import ModelReading
from shardwright.verify.ranks import RankPool, shared_mesh
from shardwright.verify.step import full
from shardwright.verify.tiny import randomize, shrunk_config

# float64, so that nothing but a mistake is larger than this; not all of transformers' code is float64 throughout.
EXACT = 1e-6


class WithLoss(nn.Module):
    """A hand-written model as a training loop calls it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.model = HANDWRITTEN[name]()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)


# Its code deals the heads out to four parts, each fused by itself, so that eight heads are the fewest for two ranks.
OWN = {"codegen": {"n_embd": 64, "n_head": 8, "rotary_dim": 4, "n_layer": 2, "n_positions": 32, "vocab_size": 96}}


def build(name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    if name in HANDWRITTEN:
        x = example(name)
        model = WithLoss(name)
        inputs = {"x": x.double() if x.is_floating_point() else x}
    else:
        own = OWN.get(name)
        config = CONFIG_MAPPING[name](**own) if own else shrunk_config(CONFIG_MAPPING[name]())
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model = auto.from_config(config)
        ids = torch.randint(4, 80, (2, 12))
        inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if config.is_encoder_decoder else {})
    randomize(model)
    return model.double(), inputs


def step(model: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    output = model(**inputs)
    logits = output if isinstance(output, torch.Tensor) else output["logits"]
    targets = torch.arange(logits.shape[:-1].numel()) % 10
    loss = nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets)
    loss.backward()
    values = {name: full(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    return values | {"loss": full(loss), "logits": full(logits)}


def worst_error(name: str, sequence_parallel: bool, folder: str, tp: int = 2) -> tuple[float, str]:
    model, inputs = build(name)
    expected = step(copy.deepcopy(model), inputs)
    path = Path(folder) / "plan.yaml"
    config = ParallelConfig(tp=tp, dp_shard=1, sequence_parallel=sequence_parallel, plan=str(path))
    parallelize(model, config)
    found = step(model, inputs)
    assert found.keys() == expected.keys()
    scale = max(value.abs().max().item() for key, value in expected.items() if key not in ("loss", "logits"))
    errors = {}
    for key, value in expected.items():
        least = 1.0 if key in ("loss", "logits") else 1e-3 * scale  # a key bias has no gradient but rounding
        errors[key] = (found[key] - value).abs().max().item() / max(value.abs().max().item(), least)
    worst = max(errors, key=lambda key: errors[key])
    return errors[worst], worst


CASES = [
    *((name, False) for name in HANDWRITTEN),
    *((name, True) for name in ("nano", "mini", "temple", "vision")),
    ("opt", False),
    ("codegen", True),
    *((name, sp) for name in ("gptj", "gpt_neox", "bart", "stablelm") for sp in (False, True)),
]


@pytest.mark.parametrize(("name", "sequence_parallel"), CASES)
def test_exact(name: str, sequence_parallel: bool, ranks2: RankPool, tmp_path: Path) -> None:
    model, inputs = build(name)
    plan = derive_plan(model, inputs)
    assert "rowwise" in plan.styles.values()
    (tmp_path / "plan.yaml").write_text(plan.to_yaml())
    for error, where in ranks2.run(worst_error, name, sequence_parallel, str(tmp_path)):
        assert error < EXACT, where


@pytest.mark.parametrize("name", ["nano", "temple", "vision", "opt", "stablelm"])
def test_exact_on_four_ranks(name: str, ranks4: RankPool, tmp_path: Path) -> None:
    model, inputs = build(name)
    plan = derive_plan(model, inputs, tp=4)
    assert "rowwise" in plan.styles.values()
    (tmp_path / "plan.yaml").write_text(plan.to_yaml())
    for error, where in ranks4.run(worst_error, name, True, str(tmp_path), 4):
        assert error < EXACT, where


def collectives(layers: int, folder: str) -> int:
    model = HANDWRITTEN["nano"](layers=layers)
    parallelize(model, ParallelConfig(tp=2, dp_shard=1, plan=f"{folder}/plan.yaml"))
    with CommDebugMode() as counted:
        model(example("nano")).square().mean().backward()
    return sum(counted.get_comm_counts().values())


def test_a_nano_gpt_layer_takes_four_collectives(ranks2: RankPool, tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(derive_plan(HANDWRITTEN["nano"](), example("nano")).to_yaml())
    few, many = (ranks2.run(collectives, layers, str(tmp_path))[0] for layers in (2, 5))
    assert many - few == 3 * 4


def test_a_width_that_code_uses_for_more_than_its_size_is_not_silently_wrong(ranks2: RankPool) -> None:
    for values in ranks2.run(with_a_plan_that_is_wrong):
        assert values != values  # NaN


def with_a_plan_that_is_wrong() -> float:
    model = nn.Sequential(Residual())
    plan = ParallelPlan({"0.up": "colwise", "0.down": "rowwise"}, local_arguments={"0": ("x:width",)})
    resolved = resolve(ModelReading(model), plan, 2)
    apply_tensor_parallel(model, shared_mesh(ParallelConfig(tp=2, dp_shard=1))["tp"], resolved)
    return float(model(torch.randn(2, 3, 8)).sum().detach())


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x)) + x.mean()
