"""What context parallelism keeps and sends, counted on one rank of a group that exchanges nothing, beside the formulas.

The rank is the last one, which sees all keys.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny_models import build
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from shardwright import ParallelConfig, make_mesh
from shardwright.distributed.apply.context_parallel import apply_context_parallel
from shardwright.distributed.apply.loss_tiles import apply_loss_tiles
from shardwright.distributed.apply.tensor_parallel import apply_tensor_parallel
from shardwright.distributed.models.attention import attention_kernels, register_context_attention
from shardwright.distributed.planning.decide import decide
from shardwright.distributed.replay.reading import ModelReading
from shardwright.distributed.runtime.context.attention import last_queries
from shardwright.distributed.runtime.context.sharded import ContextSharded
from shardwright.estimate.predict import predict
from shardwright.estimate.report import print_report
from shardwright.verify.public import case_of

LENGTH, ROWS, LAYERS = 256, 3, 2
KEYS_AND_VALUES = 2 * ROWS * LENGTH * 2 * 8  # of a layer: elements, with two key-value heads of size 8


def split(
    fake_world: Callable[..., None], cp: int, tp: int = 1, *, model: nn.Module | None = None, rank: int = -1,
    **settings: Any,
) -> nn.Module:  # fmt: skip
    """The last rank's model, without data parallelism: no parameter is sent."""
    config = ParallelConfig(cp=cp, tp=tp, dp_shard=1, sequence_parallel=tp > 1, **settings)
    fake_world(cp * tp, rank=rank % (cp * tp))
    mesh = make_mesh(config, "cpu")
    model = model or build("llama", max_position_embeddings=LENGTH)
    decided = decide(ModelReading(model), config, tp=tp, cp=cp, fsdp2=False)
    assert decided.context is not None
    both = None
    if decided.tensor is not None:
        apply_tensor_parallel(model, mesh["tp"], decided.tensor)
        both = mesh["cp", "tp"]
    register_context_attention()
    kernels = attention_kernels(model, {name: use.kernel for name, use in decided.context.attention.items()})
    apply_context_parallel(model, mesh["cp"], both, decided.context, kernels)
    if decided.tiles.head is not None:
        apply_loss_tiles(model, decided.tiles.head, decided.tiles.loss)
    return model


def tokens() -> dict[str, Tensor]:
    ids = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH) % 99
    return {"input_ids": ids, "labels": ids}


def kept(model: nn.Module) -> list[Tensor]:
    """What backward will read, each storage once, parameters left out."""
    known = {_local(param).untyped_storage().data_ptr() for param in model.parameters()}
    found: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        part = _local(x).detach()
        if part.untyped_storage().data_ptr() not in known:
            found.setdefault(part.untyped_storage().data_ptr(), part)
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        model(**tokens())
    return list(found.values())


def _local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def held(tensors: list[Tensor], cp: int) -> int:
    """Bytes of numbers that are not ids, without the masks ``[queries, keys]`` that a CPU makes."""
    numbers = [x for x in tensors if x.is_floating_point() and x.shape[-2:] != (LENGTH // cp, LENGTH)]
    return sum(x.untyped_storage().nbytes() for x in numbers)


@pytest.mark.parametrize("cp", [2, 4, 8])
def test_a_rank_keeps_its_part(fake_world: Callable[..., None], cp: int) -> None:
    """Of everything but the keys and values that attention reads, and of these what there is in one process."""
    read = LAYERS * KEYS_AND_VALUES * 4
    one = held(kept(build("llama", max_position_embeddings=LENGTH)), 1)
    tensors = kept(split(fake_world, cp))
    assert held(tensors, cp) == pytest.approx((one - read) / cp + read, rel=0.01)
    longer = [x for x in tensors if x.is_floating_point() and LENGTH in x.shape[:-1]]
    assert sum(x.untyped_storage().nbytes() for x in longer) == read


def test_the_mask_of_plain_causal_attention_takes_no_memory() -> None:
    """Torch's own function takes 4 bytes for every pair of positions: half a tebibyte here."""
    bias = last_queries(1 << 17, 1 << 20)
    assert (bias.seq_len_q, bias.seq_len_kv) == (1 << 17, 1 << 20)
    assert bias.untyped_storage().nbytes() == 0


class Received(TorchDispatchMode):
    """Elements of the whole tensor of every collective: name -> how often of each size."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        if func.namespace == "_c10d_functional" and "wait" not in func.__name__:
            whole = max(args[0].numel(), result.numel())
            self.calls[func.__name__.partition(".")[0], whole] += 1
        return result


@pytest.mark.parametrize("cp", [2, 4])
def test_attention_sends_what_the_formula_says(fake_world: Callable[..., None], cp: int) -> None:
    """Keys and values are gathered once a layer, their gradients summed once; else numbers of the loss are sent."""
    model = split(fake_world, cp)
    with Received() as forward:
        loss = model(**tokens()).loss
    assert forward.calls == {("all_gather_into_tensor", KEYS_AND_VALUES): LAYERS, ("all_reduce", 1): 2}
    with Received() as backward:
        loss.backward()
    assert backward.calls == {("reduce_scatter_tensor", KEYS_AND_VALUES): LAYERS, ("all_reduce", 1): 1}
    # What a plan says of it: a rank sends all but its own part.
    (said,) = predict(build("llama"), ParallelConfig(cp=cp, dp_shard=1)).context
    assert (said.where, said.layers, said.method) == ("model.layers.*.self_attn", LAYERS, "gather")
    assert said.sent * ROWS * LENGTH == pytest.approx(KEYS_AND_VALUES * 4 * (cp - 1) / cp)


@pytest.mark.parametrize("window", [32, 100])
def test_a_window_sends_the_positions_before_a_part(fake_world: Callable[..., None], window: int) -> None:
    """No more, though it may be longer than a part; of keys and values a rank keeps those that it looks at."""
    mistral = build("mistral", max_position_embeddings=LENGTH, sliding_window=window)
    model = split(fake_world, 4, model=mistral, rank=2)
    with Received() as forward:
        loss = model(**tokens()).loss
    with Received() as backward:
        loss.backward()
    sent = KEYS_AND_VALUES * (window - 1) // LENGTH
    assert forward.calls == {("all_to_all_single", sent): LAYERS, ("all_reduce", 1): 2}
    assert backward.calls == {("all_to_all_single", sent): LAYERS, ("all_reduce", 1): 1}
    assert not [x for x in kept(model) if x.is_floating_point() and LENGTH in x.shape[:-1]]
    (said,) = predict(build("mistral", sliding_window=window), ParallelConfig(cp=4, dp_shard=1)).context
    assert (said.window, said.sent_per_sequence) == (window, sent * 4 // ROWS)


def test_documents_send_what_they_share(fake_world: Callable[..., None]) -> None:
    """A rank's part begins in the middle of a document, of which it fetches the 28 positions before."""
    model = split(fake_world, 4, rank=2)
    positions = torch.cat([torch.arange(100), torch.arange(64), torch.arange(92)]).expand(ROWS, -1)
    with Received() as forward:
        model(**tokens(), position_ids=positions, use_cache=False)
    assert forward.calls["all_to_all_single", KEYS_AND_VALUES * 28 // LENGTH] == LAYERS


def test_logits_are_split_with_tensor_parallel_ranks(fake_world: Callable[..., None]) -> None:
    """Over the sequence and the vocabulary: the norm before the head does not make the stream whole."""
    logits = split(fake_world, 2, tp=2)(**tokens()).logits
    assert isinstance(logits, ContextSharded)
    assert logits.shape == (ROWS, LENGTH, 99)
    assert logits.to_local().shape == (ROWS, LENGTH // 2, 49)


@pytest.mark.parametrize("tp", [1, 2])
def test_logits_in_tiles_are_not_kept(fake_world: Callable[..., None], tp: int) -> None:
    """What is kept has as many numbers for each position as the vocabulary only where there are no tiles."""
    wide = {}
    for tiles in (1, 8):
        tensors = kept(split(fake_world, 2, tp, loss_tiles=tiles))
        wide[tiles] = [x for x in tensors if x.is_floating_point() and x.shape[-1:] in ((99,), (49,))]
    assert sum(x.numel() for x in wide[1]) >= ROWS * (LENGTH // 2) * (99 // tp)
    assert not wide[8]


@pytest.mark.parametrize("cp", [2, 4])
def test_exchanged_heads(fake_world: Callable[..., None], cp: int) -> None:
    """All that is kept falls as 1/cp, and two exchanges a layer carry a rank's part, forward and backward.

    The result of attention is kept twice: by the kernel, of this rank's heads, and by the projection, of its positions.
    """
    one = held(kept(build("llama", max_position_embeddings=LENGTH)), 1)
    model = split(fake_world, cp, context_method="ulysses")
    repeated = max(2, cp)  # key-value heads: two, repeated for four ranks
    more = LAYERS * ROWS * LENGTH * 8 * 4 * (4 + 2 * (repeated - 2))
    assert held(kept(model), cp) == pytest.approx((one + more) / cp, rel=0.01)
    part = ROWS * LENGTH // cp * 8
    with Received() as forward:
        loss = model(**tokens()).loss
    with Received() as backward:
        loss.backward()
    expected = Counter({("all_to_all_single", part * (4 + 2 * repeated)): LAYERS})
    expected.update({("all_to_all_single", part * 4): LAYERS})
    assert forward.calls - Counter({("all_reduce", 1): 2}) == expected
    assert backward.calls - Counter({("all_reduce", 1): 1}) == expected
    (said,) = predict(build("llama"), ParallelConfig(cp=cp, dp_shard=1, context_method="ulysses")).context
    assert said.method == "ulysses"
    assert said.sent * ROWS * LENGTH == pytest.approx(part * (8 + 2 * repeated) * 4 * (cp - 1) / cp)


def test_a_plan_says_what_is_gathered_for_other_mixers() -> None:
    """A mixer is given the stream, and positions that every rank knows; half of it comes from another rank."""
    model = case_of("falcon_h1", ParallelConfig(cp=2)).build()
    prediction = predict(model, ParallelConfig(cp=2, dp_shard=1))
    said = {part.where.rpartition(".")[2]: (part.method, part.sent) for part in prediction.context}
    assert said["mamba"] == ("whole", model.config.hidden_size * 4 / 2)
    assert said["self_attn"][0] == "gather"
    console = Console(width=400, file=io.StringIO())
    print_report(prediction, console)
    report = console.file.getvalue()
    assert "tp 1 x cp 2 x dp_shard 1 = 2 ranks" in report
    assert "what it is given is gathered. For each token of a sequence a rank sends 0.125 KiB forward" in report
