"""Training loops as people write them: every one gives what it gives in one process, with nothing else to call."""

from __future__ import annotations

import copy
import inspect
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from steps import assert_same, assert_same_gradients, assert_same_parameters
from tiny_models import batch, build
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from shardwright import ParallelConfig, parallelize
from shardwright.distributed.parallelizer import fsdp2_strategy_parallelize, get_hf_tp_shard_plan
from shardwright.errors import UnsupportedError
from shardwright.verify.ranks import RankPool, shared_mesh
from shardwright.verify.step import full

LAYOUTS_OF_TWO = (
    ParallelConfig(tp=2),
    ParallelConfig(tp=2, sequence_parallel=True),
    ParallelConfig(dp_shard=2),
)
LAYOUTS_OF_FOUR = (
    ParallelConfig(tp=2, dp_shard=2),
    ParallelConfig(tp=2, dp_shard=2, sequence_parallel=True),
    ParallelConfig(tp=2, dp_replicate=2, dp_shard=1),
)


def _layouts() -> tuple[ParallelConfig, ...]:
    return LAYOUTS_OF_TWO if dist.get_world_size() == 2 else LAYOUTS_OF_FOUR


def _parallel(model: nn.Module, config: ParallelConfig) -> nn.Module:
    return parallelize(model, config, shared_mesh(config))


def _batches(config: ParallelConfig, step: int, accumulate: int) -> tuple[list[Any], list[Any]]:
    """(this rank's micro-batches, everyone's)."""
    mesh = shared_mesh(config)["dp"]
    size, rank = mesh.size(), mesh.get_local_rank()
    everyone = [[batch(100 * step + 10 * r + k) for k in range(accumulate)] for r in range(size)]
    return everyone[rank], [each for theirs in everyone for each in theirs]


def _backward(model: nn.Module, batches: list[Any], count: int) -> None:
    for each in batches:
        (model(**each).loss / count).backward()


Optimizer = Callable[[Any], torch.optim.Optimizer]
# lr and eps: see test_parity. Weight decay and momentum make the second step depend on the first one's state.
OPTIMIZERS: dict[str, Optimizer] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, eps=1e-2),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, eps=1e-2, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=1e-2, eps=1e-2, fused=True),
    "adamw one by one": lambda p: torch.optim.AdamW(p, lr=1e-2, eps=1e-2, foreach=False),
    "sgd foreach": lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9, weight_decay=0.1, foreach=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9, nesterov=True, foreach=False),
}


def _stock_optimizers_and_clipping() -> None:
    for turn, (name, make) in enumerate(OPTIMIZERS.items()):
        config = _layouts()[turn % 3]
        reference = build("qwen3", tie_word_embeddings=bool(turn % 2))
        model = _parallel(copy.deepcopy(reference), config)
        optimizer, expected = make(model.parameters()), make(reference.parameters())
        for step in range(2):
            mine, everyone = _batches(config, step, 2)
            optimizer.zero_grad()
            expected.zero_grad()
            _backward(model, mine, len(mine))
            _backward(reference, everyone, len(everyone))
            kind = math.inf if turn % 3 == 2 else 2.0
            options: dict[str, Any] = {"foreach": True} if turn % 2 else {}
            norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1, norm_type=kind, **options)
            assert_same(norm, nn.utils.clip_grad_norm_(reference.parameters(), 0.1, norm_type=kind), f"{name}: norm")
            assert_same_gradients(model, reference, f"{name}, step {step}, clipped")
            optimizer.step()
            expected.step()
            assert_same_parameters(model, reference, f"{name}, step {step}")


@pytest.mark.parametrize("pool", ["ranks2", pytest.param("ranks4", marks=pytest.mark.sweep)])
def test_stock_optimizers_and_clipping(request: pytest.FixtureRequest, pool: str) -> None:
    request.getfixturevalue(pool).run(_stock_optimizers_and_clipping)


def _deferred_synchronisation() -> None:
    """FSDP2's own switch: the first micro-batches are not reduced."""
    for config in LAYOUTS_OF_FOUR[:2]:
        reference = build("gemma3_text")
        model: Any = _parallel(copy.deepcopy(reference), config)
        mine, everyone = _batches(config, 0, 3)
        for index, each in enumerate(mine):
            model.set_requires_gradient_sync(index == len(mine) - 1)
            (model(**each).loss / 3).backward()
        _backward(reference, everyone, len(everyone))
        assert_same_gradients(model, reference, str(config))


def test_deferred_gradient_synchronisation(ranks4: RankPool) -> None:
    ranks4.run(_deferred_synchronisation)


# Frozen parameters


def _freeze(model: nn.Module, frozen: Callable[[str], bool]) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not frozen(name))
    return model


FROZEN: dict[str, Callable[[str], bool]] = {
    "embedding": lambda name: "embed_tokens" in name,
    "everything but the norms": lambda name: "norm" not in name,
    "everything but the head": lambda name: "lm_head" not in name,
    "the norms": lambda name: "norm" in name,
    "the first block": lambda name: "layers.0." in name,
    "the key projections": lambda name: "k_proj" in name,
}


def _frozen_parameters() -> None:
    for turn, (name, frozen) in enumerate(FROZEN.items()):
        config = _layouts()[turn % 3]
        config = config.with_(activation_checkpointing="full" if turn % 2 else "none")
        reference = _freeze(build("qwen3"), frozen)
        model = _parallel(_freeze(build("qwen3"), frozen), config)
        mine, everyone = _batches(config, 0, 2)
        _backward(model, mine, len(mine))
        _backward(reference, everyone, len(everyone))
        assert_same_gradients(model, reference, name)
        for parameter, whole in zip(model.parameters(), reference.parameters(), strict=True):
            assert parameter.requires_grad == whole.requires_grad
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        norm = nn.utils.clip_grad_norm_(trained, 1e9)
        assert_same(norm, nn.utils.clip_grad_norm_(reference.parameters(), 1e9), f"{name}: norm")


@pytest.mark.parametrize("pool", ["ranks2", pytest.param("ranks4", marks=pytest.mark.sweep)])
def test_frozen_parameters(request: pytest.FixtureRequest, pool: str) -> None:
    request.getfixturevalue(pool).run(_frozen_parameters)


class Adapted(nn.Module):
    """A frozen linear layer with a trained low-rank one beside it."""

    def __init__(self, base: nn.Linear, rank: int = 3) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


def _with_adapters() -> nn.Module:
    model = build("qwen3").requires_grad_(False)
    for block in model.model.layers:
        for name in ("q_proj", "v_proj"):
            setattr(block.self_attn, name, Adapted(getattr(block.self_attn, name)))
    return model


def _low_rank_adapters() -> None:
    for config in _layouts():
        reference, model = _with_adapters(), _with_adapters()
        plan: Any = get_hf_tp_shard_plan(build("qwen3"))
        for name in ("q_proj", "v_proj"):
            glob = f"model.layers.*.self_attn.{name}"
            plan[f"{glob}.base"] = plan.pop(glob)
            plan |= {f"{glob}.down": "replicate", f"{glob}.up": "colwise"}
        mesh = shared_mesh(config)
        sequence = config.sequence_parallel
        policy = MixedPrecisionPolicy()
        fsdp2_strategy_parallelize(model, mesh, policy, sequence_parallel=sequence, tp_shard_plan=plan)
        mine, everyone = _batches(config, 0, 2)
        _backward(model, mine, len(mine))
        _backward(reference, everyone, len(everyone))
        assert_same_gradients(model, reference, str(config))


@pytest.mark.parametrize("pool", ["ranks2", "ranks4"])
def test_low_rank_adapters_beside_a_frozen_base(request: pytest.FixtureRequest, pool: str) -> None:
    request.getfixturevalue(pool).run(_low_rank_adapters)


# Copies, evaluation, generation


def _copies_are_independent() -> None:
    for config in LAYOUTS_OF_TWO[:2]:
        reference = build("qwen3")
        model = _parallel(copy.deepcopy(reference), config)
        twin = copy.deepcopy(model)
        assert not {id(p) for p in model.parameters()} & {id(p) for p in twin.parameters()}
        before = {name: full(parameter) for name, parameter in model.named_parameters()}
        twin(**batch(0)).loss.backward()
        assert all(parameter.grad is None for parameter in model.parameters())
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        for name, parameter in model.named_parameters():
            assert torch.equal(full(parameter), before[name]), name
        model(**batch(0)).loss.backward()
        reference(**batch(0)).loss.backward()
        assert_same_gradients(model, reference, str(config))


def test_a_deep_copy_is_a_model_of_its_own(ranks2: RankPool) -> None:
    ranks2.run(_copies_are_independent)


def _generation() -> None:
    """Greedy and padded, with a key-value cache; the same tokens on every rank as in one process."""
    for family, config in zip(("llama", "gemma2", "qwen3"), _layouts(), strict=True):
        reference = build(family, num_key_value_heads=1).eval()
        model = _parallel(build(family, num_key_value_heads=1), config).eval()
        ids = batch(2, length=5)["input_ids"].clamp(min=3)
        mask = torch.ones_like(ids)
        ids[0, :2], mask[0, :2] = 0, 0
        options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        expected = reference.generate(ids, **options)
        assert torch.equal(model.generate(ids, **options), expected), f"{family} {config}"
        uncached = model.generate(ids, **options, use_cache=False)
        assert torch.equal(uncached, expected), f"{family} {config} without a cache"


@pytest.mark.parametrize("pool", ["ranks2", "ranks4"])
def test_generate(request: pytest.FixtureRequest, pool: str) -> None:
    request.getfixturevalue(pool).run(_generation)


def _generation_of_padded_ids() -> None:
    """transformers makes the mask itself where it sees padding and a model that takes one."""
    for config in _layouts():
        reference = build("llama").eval()
        model = _parallel(copy.deepcopy(reference), config)
        ids = batch(3, length=6)["input_ids"].clamp(min=3)
        ids[0, :2] = 0
        options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        expected = reference.generate(ids, **options)
        assert not torch.equal(expected, reference.generate(ids, attention_mask=torch.ones_like(ids), **options))
        assert torch.equal(model.generate(ids, **options), expected), str(config)
        assert inspect.signature(model.forward) == inspect.signature(reference.forward)


def test_generate_finds_the_padding(ranks2: RankPool) -> None:
    ranks2.run(_generation_of_padded_ids)


def _switching_modes() -> None:
    """Evaluation between training steps leaves no trace in either."""
    config = ParallelConfig(tp=2, sequence_parallel=True, activation_checkpointing="full")
    reference = build("gemma2")
    model = _parallel(copy.deepcopy(reference), config)
    for step in range(2):
        with torch.no_grad():
            model.eval()
            reference.eval()
            ids = batch(50 + step)["input_ids"]
            assert_same(model(input_ids=ids).logits, reference(input_ids=ids).logits, f"evaluation {step}")
            model.train()
            reference.train()
        for each in (model, reference):
            each(**batch(step)).loss.backward()
        assert_same_gradients(model, reference, f"step {step}")


def test_evaluation_between_steps(ranks2: RankPool) -> None:
    ranks2.run(_switching_modes)


# What is sharded, and what is sent


def _shares() -> None:
    for config in _layouts():
        model = _parallel(build("qwen3", vocab_size=100, num_key_value_heads=4), config)
        mesh = shared_mesh(config)
        ranks = mesh["tp"].size() * mesh["dp_shard"].size()
        for name, parameter in model.named_parameters():
            assert isinstance(parameter, DTensor), name
            share = ranks if parameter.ndim == 2 else mesh["dp_shard"].size()
            local = parameter.to_local()
            assert local.numel() * share == parameter.numel(), f"{config}: {name}"
            assert local.untyped_storage().nbytes() <= (local.numel() + 16) * local.element_size(), name


@pytest.mark.parametrize("pool", ["ranks2", "ranks4"])
def test_every_rank_holds_its_share_and_no_more(request: pytest.FixtureRequest, pool: str) -> None:
    request.getfixturevalue(pool).run(_shares)


def _collectives(layers: int, sequence_parallel: bool) -> Counter[str]:
    model = _parallel(
        build("llama", num_hidden_layers=layers), ParallelConfig(tp=2, sequence_parallel=sequence_parallel)
    )
    with CommDebugMode() as seen:
        model(**batch(0)).loss.backward()
    return Counter({op.__name__: count for op, count in seen.get_comm_counts().items()})


def _collectives_per_layer() -> None:
    for sequence_parallel in (False, True):
        more = dict(_collectives(3, sequence_parallel) - _collectives(2, sequence_parallel))
        if sequence_parallel:
            # 2 forward and 2 backward, each an all-gather and a reduce-scatter
            assert more == {"all_gather_into_tensor": 4, "reduce_scatter_tensor": 4}
        else:
            assert more == {"all_reduce": 4}


def test_a_dense_layer_takes_four_collectives_per_step(ranks2: RankPool) -> None:
    ranks2.run(_collectives_per_layer)


def _note_backward(heard: list[str], name: str) -> Callable[..., None]:
    return lambda module, before, after: heard.append(name)


def _hooked() -> None:
    """Module backward hooks give every reader an input of its own; the readers share it all the same."""
    plain = build("llama")
    plain(**batch(0)).loss.backward()
    for sequence_parallel in (False, True):
        model = _parallel(copy.deepcopy(plain), ParallelConfig(tp=2, sequence_parallel=sequence_parallel))
        model.zero_grad()
        heard: list[str] = []
        for name, module in model.named_modules():
            module.register_full_backward_hook(_note_backward(heard, name))
        with CommDebugMode() as seen:
            model(**batch(0)).loss.backward()
        assert {name for name, _ in model.named_modules() if name.endswith("_proj")} <= set(heard)
        assert seen.get_total_counts() == sum(_collectives(2, sequence_parallel).values())
        assert_same_gradients(model, plain)


def test_module_backward_hooks_run_and_change_nothing(ranks2: RankPool) -> None:
    ranks2.run(_hooked)


def _split_sequence() -> None:
    model = _parallel(build("llama"), ParallelConfig(tp=2, sequence_parallel=True))
    seen: list[tuple[int, ...]] = []
    block = model.model.layers[1]
    block.post_attention_layernorm.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
    model(**batch(0))
    assert seen == [(2, 8 if dist.get_rank() == 0 else 7, 32)]


def test_sequence_parallelism_splits_the_residual_stream(ranks2: RankPool) -> None:
    ranks2.run(_split_sequence)


# Random numbers


def _random_state_after(config: ParallelConfig, family: str) -> None:
    model = build(family)
    torch.manual_seed(dist.get_rank())
    before = torch.get_rng_state()
    _parallel(model, config)
    assert torch.equal(torch.get_rng_state(), before), f"{family} {config}"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_rank_keeps_its_random_state(family: str, ranks4: RankPool) -> None:
    """Else the data-parallel ranks, seeded apart, would all drop the same; gpt2's plan is read off its code."""
    for config in LAYOUTS_OF_FOUR:
        ranks4.run(_random_state_after, config.with_(activation_checkpointing="full"), family)


# Averaged weights in torch's own class

AVERAGES: dict[str, dict[str, Any]] = {
    "equal": {},
    "exponential": {"multi_avg_fn": get_ema_multi_avg_fn(0.7)},
    "exponential, one by one": {"avg_fn": get_ema_avg_fn(0.7), "use_buffers": True},
    "a function of one's own": {"avg_fn": lambda mean, now, count: mean + (now - mean) / (count + 2)},
}


def _averaged_models() -> None:
    for turn, (name, how) in enumerate(AVERAGES.items()):
        for config in _layouts() if not turn else _layouts()[turn % 3 :][:1]:
            reference = build("llama", tie_word_embeddings=bool(turn % 2))
            expected = AveragedModel(reference, **how)
            model = copy.deepcopy(reference)
            averaged = AveragedModel(model, **how)
            for each in (model, averaged.module):
                _parallel(each, config)
            optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (model, reference)]
            for step in range(3):
                mine, everyone = _batches(config, step, 1)
                _backward(model, mine, 1)
                _backward(reference, everyone, len(everyone))
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
                averaged.update_parameters(model)
                expected.update_parameters(reference)
                with torch.no_grad():
                    assert_same(averaged(**mine[0]).loss, expected(**mine[0]).loss, f"{name}, {config}, step {step}")
            assert_same_parameters(averaged, expected, f"{name}, {config}")


@pytest.mark.parametrize("pool", ["ranks2", pytest.param("ranks4", marks=pytest.mark.sweep)])
def test_averaged_models(pool: str, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue(pool).run(_averaged_models)


def _copies() -> str:
    model = _parallel(build("llama"), ParallelConfig(tp=2))
    averaged = AveragedModel(model)
    averaged.update_parameters(model)
    assert_same(averaged(**batch(0)).loss, build("llama")(**batch(0)).loss, "a copy of a tensor-parallel model")
    try:
        AveragedModel(_parallel(build("llama"), ParallelConfig(dp_shard=2)))
    except UnsupportedError as error:
        return str(error)
    return ""


def test_a_copy_is_a_model_or_refused(ranks2: RankPool) -> None:
    for error in ranks2.run(_copies):
        assert "parallelize(averaged.module, config, mesh)" in error
