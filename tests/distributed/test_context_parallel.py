"""Context parallelism: every rank is given the whole batch, works on a part of every sequence, and it is one model.

As everywhere, a step is compared with one process: losses, logits, every gradient, the norm and every updated parameter
to a relative 1e-5, with two accumulated micro-batches.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from functools import partial
from typing import Any

import pytest
import torch
from tiny_models import assert_exact, batch, build
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shardwright import ParallelConfig, parallelize
from shardwright.distributed.planning.context import plan_context
from shardwright.distributed.planning.decide import decide
from shardwright.distributed.replay.context_answers import Unsplit
from shardwright.distributed.replay.context_parts import BlockFinding, BlockReplay
from shardwright.distributed.replay.reading import ModelReading
from shardwright.errors import ConfigError, PlanError
from shardwright.verify.public import case_of, verify
from shardwright.verify.ranks import RankPool, shared_mesh

CP2 = ParallelConfig(cp=2, dp_shard=1)

# Type -> what is gathered of its blocks, by glob: keys and values, or the whole of the sequence.
TYPES = {
    "qwen3": ({"self_attn"}, set()),
    "gpt_oss": ({"self_attn"}, set()),  # sinks, sliding windows, experts
    "gemma3_text": ({"self_attn"}, set()),
    "gemma3n_text": ({"self_attn"}, set()),  # keys and values that blocks take from other blocks
    "deepseek_v3": ({"self_attn"}, set()),  # latent attention: keys and values of different sizes
    "bloom": (set(), {"self_attention"}),  # ALiBi, attention of its own
    "t5": ({"SelfAttention", "EncDecAttention"}, {"SelfAttention"}),  # relative bias, cross-attention
    "mamba2": (set(), {"mixer"}),
    "falcon_h1": ({"self_attn"}, {"mamba"}),
    "bert": ({"self"}, set()),  # bidirectional
}


# What these are made of is in a batch below, or in another of these types.
HELD_ELSEWHERE = {"qwen3", "gemma3_text", "mamba2"}


def some(cases: Iterable[str], sweep: Container[str]) -> list[Any]:
    """Cases to run, of which those in ``sweep`` repeat mechanisms that others hold."""
    return [pytest.param(case, marks=pytest.mark.sweep) if case in sweep else case for case in cases]


@pytest.mark.parametrize("model_type", some(TYPES, HELD_ELSEWHERE))
def test_kinds_of_mixers(ranks2: RankPool, model_type: str) -> None:
    report = verify(model_type, CP2, accumulate=2, pool=ranks2)
    assert report.exact, report
    if model_type != "gemma3n_text":  # rounding: 4e-6 with all keys, 4e-5 with those looked at; 4e-14 in float64
        assert report.precision == "float32", report


@pytest.mark.parametrize("model_type", TYPES)
def test_what_is_gathered(model_type: str) -> None:
    plan = plan_context(ModelReading(case_of(model_type, CP2).build()))
    gathering, whole = TYPES[model_type]
    assert {name.rpartition(".")[2] for name in plan.attention} == gathering
    assert {name.rpartition(".")[2] for name in plan.regions} == whole
    assert not plan.whole
    assert all(any(name.startswith(f"{block}.") for block in plan.blocks) for name in plan.attention)


def test_recorded_modules_may_give_a_plain_tensor() -> None:
    """DBRX hands out what its routers give, which is no tuple."""
    plan = plan_context(ModelReading(case_of("dbrx", CP2).build()))
    assert not plan.whole
    assert {name.rpartition(".")[2] for name in plan.recorded} >= {"router"}


def padded(index: int) -> dict[str, Tensor]:
    """Thirteen positions, padding on either side, labels for the first half of them alone."""
    made = batch(index, rows=3, length=13)
    mask = torch.ones_like(made["input_ids"])
    mask[0, :4], mask[1, -5:] = 0, 0
    labels = made["labels"].masked_fill(mask == 0, -100)
    labels[:, 6:] = -100
    return {**made, "attention_mask": mask, "labels": labels}


def packed(index: int) -> dict[str, Tensor]:
    """Two documents of different lengths in every row, with positions that start again."""
    made = batch(index, length=15)
    positions = torch.cat([torch.arange(6), torch.arange(9)]).expand(2, -1).clone()
    return {**made, "position_ids": positions}


def packed_without_cache(index: int) -> dict[str, Any]:
    return {**packed(index), "use_cache": False}


def routed(index: int) -> dict[str, Any]:
    return {**batch(index, length=14), "output_router_logits": True, "attention_mask": padded_mask()}


def padded_mask() -> Tensor:
    mask = torch.ones(2, 14, dtype=torch.long)
    mask[1, 9:] = 0
    return mask


def embedded(index: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(index)
    embeddings = torch.randn(2, 15, 32, generator=generator)
    return {"inputs_embeds": embeddings, "labels": batch(index)["labels"]}


MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.5}
CASES = {
    "padded-windows": ("gemma3_text", {}, padded, CP2),
    "padded-eager": ("llama", {"attn_implementation": "eager"}, padded, CP2),
    "positions": ("qwen3", {}, packed, CP2),
    "packed": ("qwen3", {}, packed_without_cache, CP2),
    "packed-windows": ("mistral", {}, packed_without_cache, CP2),
    "router-losses": ("mixtral", MIXTURE, routed, CP2),
    "embeddings": ("llama", {}, embedded, CP2),
    "recomputed": ("qwen3", {}, batch, CP2.with_(activation_checkpointing="full")),
    "selective": ("qwen3", {}, batch, CP2.with_(activation_checkpointing="selective")),
}


@pytest.mark.parametrize("case", some(CASES, {"packed", "positions", "router-losses", "recomputed"}))
def test_batches(ranks2: RankPool, case: str) -> None:
    family, changes, make_batch, config = CASES[case]
    assert_exact(verify(partial(build, family, **changes), config, batch=make_batch, accumulate=2, pool=ranks2), 0.0)


def test_with_data_parallel_ranks(ranks4: RankPool) -> None:
    """A window of six positions reaches over two of the four parts, of which one has a single position."""
    for family, config in (("gemma3_text", CP2.with_(cp=4)), ("qwen3", CP2.with_(dp_shard=2))):
        assert_exact(verify(partial(build, family), config, batch=padded, accumulate=2, pool=ranks4), 0.0)


@pytest.mark.parametrize("family", some(["gemma3_text", "mixtral"], {"mixtral"}))
def test_with_tensor_parallel_ranks(ranks4: RankPool, family: str) -> None:
    changes, made = (MIXTURE, routed) if family == "mixtral" else ({}, padded)
    config = CP2.with_(tp=2)
    assert_exact(verify(partial(build, family, **changes), config, batch=made, accumulate=2, pool=ranks4), 0.5)


SP = CP2.with_(tp=2, sequence_parallel=True)
# The sequence is split over cp first, and every part over tp: 13 positions are 4, 3, 3 and 3.
SPLIT_TWICE = {
    "padded": ("llama", {}, padded),
    "padded-windows": ("gemma3_text", {}, padded),
    "packed": ("gpt_oss", {}, packed_without_cache),
    "router-losses": ("mixtral", MIXTURE, routed),
    "recurrence": ("falcon_h1", None, padded),
    "relative-bias": ("t5", None, None),
}


@pytest.mark.parametrize("case", some(SPLIT_TWICE, {"padded", "relative-bias"}))
def test_with_sequence_parallelism(ranks4: RankPool, case: str) -> None:
    family, changes, made = SPLIT_TWICE[case]
    model = family if changes is None else partial(build, family, **changes)
    report = verify(model, SP, batch=made, accumulate=2, pool=ranks4)
    assert report.exact, report
    if case != "relative-bias":  # T5 amplifies rounding to about 1e-5, without cp too, and is judged in float64 then
        assert report.precision == "float32", report
    assert report.sharded_fraction > 0.5


def test_the_plan_with_sequence_parallelism() -> None:
    """The stream is split in every block, and a mixer that gathers more of it writes a whole that is cut behind it."""
    decided = decide(ModelReading(case_of("falcon_h1", SP).build()), SP, tp=2, cp=2, fsdp2=False)
    assert decided.tensor is not None
    assert decided.tensor.blocks == ["model.layers.0", "model.layers.1"]
    direct = {name.rpartition(".")[2]: use.direct for name, use in decided.tensor.regions.items() if use.block}
    assert direct == {"self_attn": True, "feed_forward": True, "mamba": False}


def _written_logits() -> float:
    """A loss on logits that are written to first: at positions, and at some of the vocabulary."""
    losses, gradients = [], []
    for model in (build("llama"), parallelize(build("llama"), SP, shared_mesh(SP))):
        logits = model(input_ids=batch(0)["input_ids"]).logits
        logits[:, 9:11] = 0.25
        logits[..., 3:5] = 0.5
        loss = logits.square().logsumexp(-1).mean()
        loss.backward()
        grads = [param.grad for param in model.parameters() if param.grad is not None]
        gradients.append([grad.full_tensor() if isinstance(grad, DTensor) else grad for grad in grads])
        losses.append(loss.detach())
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
    return max(float((x - y).norm() / x.norm()) for x, y in zip(*gradients, strict=True))


def test_logits_that_are_written_to(ranks4: RankPool) -> None:
    assert all(error < 1e-5 for error in ranks4.run(_written_logits))


def _used() -> dict[str, Any]:
    """What a loop does besides: losses of its own, gradients of its inputs, evaluation, generation."""
    reference, model = build("llama"), build("llama")
    parallelize(model, CP2, shared_mesh(CP2))
    made, found = batch(0), {}
    embeddings = [nn.Parameter(embedded(0)["inputs_embeds"]) for _ in range(2)]
    weights = torch.rand(2, 15, 99, generator=torch.Generator().manual_seed(1))
    for name, part, given in (("one", reference, embeddings[0]), ("ours", model, embeddings[1])):
        out = part(inputs_embeds=given)
        found[f"{name}.logits"] = type(out.logits) is not Tensor and out.logits.to_local().shape[1]
        loss = (out.logits.float().log_softmax(-1) * weights).sum() + out.logits[:, 2:9].square().mean()
        loss.backward()
        found[f"{name}.loss"] = loss.detach()
    found["input gradient"] = (embeddings[0].grad - embeddings[1].grad).abs().max() / embeddings[0].grad.abs().max()
    gradients = {name: param.grad for name, param in reference.named_parameters()}
    found["gradients"] = max(
        float((param.grad.full_tensor() - gradients[name]).abs().max() / gradients[name].abs().max())
        for name, param in model.named_parameters()
        if isinstance(param.grad, DTensor)
    )
    found |= _inner_model(reference, model)
    for part in (reference, model):
        part.eval()
    with torch.no_grad():
        ids = made["input_ids"][:, :7]
        one, ours = reference(ids, use_cache=False).logits, model(ids, use_cache=False).logits
        found["evaluation"] = (one - ours).abs().max()
        told = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        found["generated"] = bool((reference.generate(ids, **told) == model.generate(ids, **told)).all())
    return found


def _inner_model(reference: nn.Module, model: nn.Module) -> dict[str, Any]:
    """The model inside called by itself: for hidden states that a layer of one's own reads, and with a cache."""
    ids, heads, steps = batch(0)["input_ids"], [], []
    for part in (reference, model):
        torch.manual_seed(0)
        head = nn.Linear(32, 3)
        head(part.model(input_ids=ids).last_hidden_state).square().mean().backward()
        heads.append(head.weight.grad)
        with torch.no_grad():
            first = part.model(input_ids=ids[:, :10], use_cache=True)
            second = part.model(input_ids=ids[:, 10:], past_key_values=first.past_key_values)
        steps.append(second.last_hidden_state)
    return {"own head": (heads[0] - heads[1]).norm() / heads[0].norm(), "own cache": (steps[0] - steps[1]).abs().max()}


def test_uses_of_a_model(ranks2: RankPool) -> None:
    for rank, found in enumerate(ranks2.run(_used)):
        assert found["ours.logits"] == (8, 7)[rank]
        torch.testing.assert_close(found["ours.loss"], found["one.loss"], rtol=1e-5, atol=0)
        assert found["input gradient"] < 1e-5
        assert found["gradients"] < 1e-5
        assert found["evaluation"] < 1e-5
        assert found["own head"] < 1e-5
        assert found["own cache"] < 1e-5
        assert found["generated"]


class Mixing(nn.Module):
    """A block that mixes positions by itself beside attention, and keeps the count of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(99, 16)
        self.layers = nn.ModuleList([Shifted() for _ in range(2)])
        self.head = nn.Linear(16, 99)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        logits = self.head(x)
        if labels is None:
            return {"logits": logits}
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return {"loss": loss, "logits": logits}


class Summed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).cumsum(1) / x.shape[1]


class Full(Summed):
    """Drops what comes behind forty positions of a kind, as experts of limited capacity do."""

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * ((x[..., :1] > 0).cumsum(1) <= 40)


class FullInTraining(Full):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.training else self.linear(x)


class Windows(Summed):
    """Means of windows, which short sequences do not fill."""

    def forward(self, x: Tensor) -> Tensor:
        longer = nn.functional.pad(x, (0, 0, 0, -x.shape[1] % 32)).unflatten(1, (-1, 32))
        return self.linear(longer.mean(2, keepdim=True).expand_as(longer).flatten(1, 2)[:, : x.shape[1]])


class Shifted(nn.Module):
    def __init__(self, mixer: type[nn.Module] = Summed) -> None:
        super().__init__()
        self.norm, self.mixer, self.mlp = nn.LayerNorm(16), mixer(), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.norm(x))
        return x + self.mlp(x).relu()


class OnlyWhole(Shifted):
    """Mixes in its own code, so that no child of it can be told to."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.roll(1, 1))


def mixing() -> nn.Module:
    torch.manual_seed(0)
    return Mixing()


def only_whole() -> nn.Module:
    model = mixing()
    assert isinstance(model, Mixing)
    model.layers = nn.ModuleList([OnlyWhole() for _ in range(2)])
    return model


def test_a_model_of_ones_own(ranks2: RankPool) -> None:
    plan = plan_context(ModelReading(mixing()))
    assert set(plan.regions) == {"layers.0.mixer", "layers.1.mixer"}
    assert_exact(verify(mixing, CP2, batch=batch, accumulate=2, pool=ranks2), 0.0)


@pytest.mark.parametrize("mixer", [Full, FullInTraining, Windows])
def test_what_mixes_only_in_long_sequences_or_in_training_is_found(mixer: type[nn.Module]) -> None:
    model = mixing()
    assert isinstance(model, Mixing)
    model.layers = nn.ModuleList([Shifted(mixer) for _ in range(2)])
    assert set(plan_context(ModelReading(model)).regions) == {"layers.0.mixer", "layers.1.mixer"}


def test_experts_that_drop_tokens_when_they_are_full_see_the_whole_sequence() -> None:
    plan = plan_context(ModelReading(case_of("nllb-moe", CP2).build()))
    sparse = {f"model.{part}.layers.{n}.ffn" for part in ("encoder", "decoder") for n in (1, 3)}
    assert set(plan.regions) == sparse
    assert all("mixes positions where there are many" in plan.reasons[name] for name in sparse)


def test_blocks_that_hand_each_other_tensors_are_split_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 3n's last blocks take keys and values of earlier ones, so none is split where one cannot be."""
    find = BlockReplay.find

    def failing(replay: BlockReplay, known: Any = None) -> BlockFinding:
        finding = find(replay, known)
        if replay.block.endswith("layers.1"):
            raise Unsplit("for a test")
        return finding

    monkeypatch.setattr(BlockReplay, "find", failing)
    with pytest.raises(PlanError, match=r"it hands tensors to a block that cannot be split .for a test"):
        plan_context(ModelReading(case_of("gemma3n_text", CP2).build()))


def test_what_would_not_be_split_is_refused() -> None:
    with pytest.raises(PlanError, match=r"would do nothing for Mixing.*layers\.\*"):
        plan_context(ModelReading(only_whole()))


def _different_batches(rank: int) -> str:
    model = parallelize(build("llama"), CP2, shared_mesh(CP2))
    try:
        model(**batch(rank))
    except ConfigError as error:
        return str(error)
    return ""


def _different() -> str:
    return _different_batches(torch.distributed.get_rank())


def test_different_batches_are_refused(ranks2: RankPool) -> None:
    assert all("were called with different inputs" in message for message in ranks2.run(_different))
