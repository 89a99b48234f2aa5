"""``unshard_fsdp2_model`` on real ranks: what it gathers, what it leaves behind, and what training notices of it."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from transformers import LlamaConfig, LlamaForCausalLM

from shardwright._torch import groups_of, states_of
from shardwright.api import parallelize
from shardwright.distributed.apply.unshard import unshard_fsdp2_model
from shardwright.distributed.config import Degrees, ParallelConfig
from shardwright.distributed.runtime.layout import whole as whole_tensor
from shardwright.verify.ranks import RankPool, shared_mesh

CONFIG = LlamaConfig(
    vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip


def _mesh() -> DeviceMesh:
    return shared_mesh(Degrees(1, dist.get_world_size(), 1, 1))["dp_shard"]


def _whole() -> LlamaForCausalLM:
    torch.manual_seed(3)
    return LlamaForCausalLM(CONFIG)


def _sharded() -> LlamaForCausalLM:
    model, mesh = _whole(), _mesh()
    blocks = model.model.layers
    for block in blocks[:-1]:
        fully_shard(block, mesh=mesh)
    fully_shard(blocks[-1], mesh=mesh, reshard_after_forward=False)
    return fully_shard(model, mesh=mesh)


def _settings(model: nn.Module) -> list[Any]:
    """Everything the context may touch, by unit."""
    names = ("post_forward_mesh_info", "reshard_after_backward", "is_sharded", "_training_state")
    return [
        (
            state._auto_reshard_after_forward,
            list(state._states_to_forward_prefetch),
            list(state._states_to_backward_prefetch),
            [(*(getattr(group, name) for name in names), list(group._post_forward_indices)) for group in groups],
            [len(group.comm_ctx.post_forward_order) for group in groups],
        )
        for state in states_of(model)
        for groups in [groups_of(state)]
    ]


def _batch(seed: int, rows: int = 2) -> torch.Tensor:
    return torch.randint(3, 61, (rows, 9), generator=torch.Generator().manual_seed(seed))


def _train_step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> float:
    ids = _batch(seed * 10 + dist.get_rank())
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def _parameters_are_whole_inside() -> None:
    model, expected = _sharded(), dict(_whole().named_parameters())
    model.model.layers[0].set_modules_to_forward_prefetch([model.model.layers[1]])
    model(input_ids=_batch(0), labels=_batch(0)).loss.backward()
    before = _settings(model)
    with unshard_fsdp2_model(model):
        names = []
        for name, parameter in model.named_parameters():
            assert not isinstance(parameter, DTensor), name
            torch.testing.assert_close(parameter.detach(), expected[name].detach(), rtol=0, atol=0)
            names.append(name)
        assert names == list(expected)
        with CommDebugMode() as counter, torch.no_grad():
            logits = model(input_ids=_batch(0)).logits
        with torch.no_grad():
            model.model(input_ids=_batch(0))  # past the root
        assert counter.get_total_counts() == 0
        torch.testing.assert_close(logits, _whole()(input_ids=_batch(0)).logits, rtol=0, atol=0)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    assert _settings(model) == before


def _nests_and_survives_errors() -> None:
    model = _sharded()
    with unshard_fsdp2_model(model), torch.no_grad():
        model(input_ids=_batch(0))
    first = _settings(model)
    # The root would be resharded after forward had its first forward, in the context, not made it the root.
    assert first[0][3][0][0] is None
    assert first[-1][3][0][0] is None
    assert first[1][3][0][0] is not None
    with pytest.raises(KeyError), unshard_fsdp2_model(model.model.layers[1]):  # noqa: PT012
        with unshard_fsdp2_model(model):
            with unshard_fsdp2_model(model):
                pass
            assert not any(isinstance(parameter, DTensor) for parameter in model.parameters())
        kinds = [isinstance(parameter, DTensor) for parameter in model.model.layers[1].parameters()]
        assert not any(kinds)
        assert isinstance(model.lm_head.weight, DTensor)
        raise KeyError
    assert _settings(model) == first

    handle = model.model.layers[1].mlp.register_forward_pre_hook(_fail)
    for grad in (False, True):
        with pytest.raises(ZeroDivisionError), unshard_fsdp2_model(model), torch.set_grad_enabled(grad):
            model(input_ids=_batch(0))
        assert _settings(model) == first
    handle.remove()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    plain = _sharded()
    plain_optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    for step in range(2):
        assert _train_step(model, optimizer, step) == _train_step(plain, plain_optimizer, step)


def _fail(*_: Any) -> None:
    raise ZeroDivisionError


def _generate(model: LlamaForCausalLM, rows: torch.Tensor, length: int) -> list[list[int]]:
    mask = torch.ones_like(rows)
    out = model.generate(rows, attention_mask=mask, do_sample=False, max_new_tokens=length, eos_token_id=None)
    return out.tolist()


def _generates_different_lengths() -> tuple[bool, list[float], list[float]]:
    """Rank 0 generates more than the others and the last rank nothing at all; then training goes on."""
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    curves = []
    same = True
    for with_context in (False, True):
        model = _sharded()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        curve = [_train_step(model, optimizer, 0)]
        for step in range(1, 4):
            if with_context:
                whole = _whole()
                full = {name: parameter.full_tensor() for name, parameter in model.state_dict().items()}
                with unshard_fsdp2_model(model):
                    if rank != last:
                        whole.load_state_dict(full)
                        rows = _batch(rank, 1 + rank)
                        length = 12 - 3 * rank
                        same &= _generate(model, rows, length) == _generate(whole, rows, length)
            curve.append(_train_step(model, optimizer, step))
        curves.append(curve)
    return same, *curves


def _sees_the_last_step() -> None:
    """A forward without gradients leaves the root gathered; an optimizer step then makes that copy stale."""
    model = _sharded()
    held_by_an_optimizer = list(model.parameters())
    with torch.no_grad():
        model(input_ids=_batch(0))
        assert not isinstance(model.lm_head.weight, DTensor)
        for parameter in held_by_an_optimizer:
            parameter.add_(1)
    full = {name: parameter.detach() + 1 for name, parameter in _whole().named_parameters()}
    with unshard_fsdp2_model(model):
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.detach(), full[name], rtol=0, atol=0)


def _first_gathered_in_inference_mode() -> None:
    model = _sharded()
    with torch.inference_mode(), unshard_fsdp2_model(model):
        model(input_ids=_batch(0))
    model(input_ids=_batch(0), labels=_batch(0)).loss.backward()


def _trains_inside() -> None:
    """A backward inside gathers nothing again, and its gradients are those of a step outside."""
    grads = []
    for context in (False, True):
        model = _sharded()
        if context:
            with unshard_fsdp2_model(model), CommDebugMode() as counter:
                model(input_ids=_batch(dist.get_rank()), labels=_batch(dist.get_rank())).loss.backward()
            counts = {str(op): count for op, count in counter.get_comm_counts().items()}
            assert not any("all_gather" in op or "allgather" in op for op in counts), counts
        else:
            model(input_ids=_batch(dist.get_rank()), labels=_batch(dist.get_rank())).loss.backward()
        grads.append({name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()})
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-7)


def _plain_model() -> None:
    model = _whole()
    with unshard_fsdp2_model(model):
        assert not hasattr(model, "_is_fsdp_managed_module")
    assert not hasattr(model, "_is_fsdp_managed_module")


CASES = (
    _parameters_are_whole_inside,
    _nests_and_survives_errors,
    _sees_the_last_step,
    _first_gathered_in_inference_mode,
    _trains_inside,
    _plain_model,
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__.strip("_"))
def test_two_ranks(ranks2: RankPool, case: Any) -> None:
    ranks2.run(case)


def test_generate_with_different_lengths_and_training_after(ranks4: RankPool) -> None:
    for same, plain, disturbed in ranks4.run(_generates_different_lengths):
        assert same
        assert plain == disturbed


def _generates_with_tensor_parallelism(sequence_parallel: bool) -> list[float]:
    """The ranks of one data-parallel rank generate the same, those of the other another length; then training."""
    config = ParallelConfig(tp=2, dp_shard=2, sequence_parallel=sequence_parallel)
    mesh = shared_mesh(config)
    dp_rank, curves = mesh["dp"].get_local_rank(), []
    for with_context in (False, True):
        model = parallelize(_whole(), config, mesh)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        curve = []
        for step in range(3):
            ids = _batch(step * 10 + dp_rank)
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curve.append(loss.item())
            if with_context:
                whole = _whole()
                whole.load_state_dict({name: tensor.full_tensor() for name, tensor in model.state_dict().items()})
                rows, length = _batch(7 + dp_rank, 1 + dp_rank), 10 - 6 * dp_rank
                with unshard_fsdp2_model(model):
                    assert _generate(model, rows, length) == _generate(whole, rows, length)
                    with torch.no_grad():
                        scores = model(input_ids=rows).logits.log_softmax(-1)
                        expected = whole(input_ids=rows).logits.log_softmax(-1)
                    torch.testing.assert_close(whole_tensor(scores), expected, rtol=1e-5, atol=1e-5)
        curves.append(curve)
    assert curves[0] == curves[1]
    return curves[0]


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_generate_with_tensor_parallelism(ranks4: RankPool, sequence_parallel: bool) -> None:
    ranks4.run(_generates_with_tensor_parallelism, sequence_parallel)


def test_replicated_shards(ranks4: RankPool) -> None:
    ranks4.run(_hsdp)


def _hsdp() -> None:
    mesh = shared_mesh(Degrees(2, 2, 1, 1))["dp_replicate", "dp_shard"]
    model, shard = _whole(), partial(fully_shard, mesh=mesh)
    for block in model.model.layers:
        shard(block)
    shard(model)
    expected = dict(_whole().named_parameters())
    with unshard_fsdp2_model(model):
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.detach(), expected[name].detach(), rtol=0, atol=0)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
