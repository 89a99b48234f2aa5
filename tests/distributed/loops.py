"""Training loops as people write them. Each takes a model and returns numbers that one process gives too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from tiny_models import batch
from torch import Tensor, nn


def loss(model: nn.Module, index: int = 0) -> Tensor:
    return model(**batch(index)).loss


@torch.no_grad()
def evaluate(model: nn.Module, index: int = 5) -> float:
    return loss(model, index).item()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([param for param in model.parameters() if param.requires_grad], lr=0.1)


def train(model: nn.Module, steps: int = 2) -> list[float]:
    optimizer, found = sgd(model), []
    for step in range(steps):
        optimizer.zero_grad()
        each = loss(model, step)
        each.backward()
        optimizer.step()
        found.append(each.item())
    return found


# A forward without a backward


def evaluated_before_the_optimizer_is_made(model: nn.Module) -> list[float]:
    return [evaluate(model), *train(model)]


def forward_with_gradients_before_the_optimizer_is_made(model: nn.Module) -> list[float]:
    return [loss(model).item(), *train(model)]


def evaluated_in_inference_mode(model: nn.Module) -> list[float]:
    with torch.inference_mode():
        before = evaluate(model)
    found = train(model)
    with torch.inference_mode():
        after = evaluate(model)
    return [before, *found, after, *train(model)]


def evaluated_between_backward_and_step(model: nn.Module) -> list[float]:
    optimizer, found = sgd(model), []
    for step in range(2):
        optimizer.zero_grad()
        loss(model, step).backward()
        found.append(evaluate(model))
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        found.append(float(norm))
    return [*found, evaluate(model)]


def evaluated_between_forward_and_backward(model: nn.Module) -> list[float]:
    optimizer, found = sgd(model), []
    for step in range(2):
        optimizer.zero_grad()
        each = loss(model, step)
        found += [each.item(), evaluate(model)]
        each.backward()
        optimizer.step()
    return found


def cleared_by_the_model(model: nn.Module) -> list[float]:
    optimizer, found = sgd(model), []
    for step in range(3):
        each = loss(model, step)
        model.zero_grad()  # between forward and backward
        each.backward()
        optimizer.step()
        found += [each.item(), evaluate(model)]
    return found


def unfrozen_after_an_evaluation(model: nn.Module) -> list[float]:
    model.requires_grad_(False)
    found = [evaluate(model)]
    model.model.norm.requires_grad_(True)
    found += train(model, 1)
    found.append(evaluate(model))
    model.requires_grad_(True)
    return [*found, *train(model, 3)]


def averaged_weights(model: nn.Module) -> list[float]:
    params, found = list(model.parameters()), []
    average = [param.detach().clone() for param in params]
    for _ in range(2):
        found += train(model, 1)
        with torch.no_grad():
            for mean, param in zip(average, model.parameters(), strict=True):
                mean.lerp_(param, 0.3)
        kept = [param.detach().clone() for param in params]
        for param, mean in zip(params, average, strict=True):
            param.data.copy_(mean)
        found.append(evaluate(model))
        for param, value in zip(params, kept, strict=True):
            param.data.copy_(value)
    return found


def moved_by_hand(model: nn.Module) -> list[float]:
    found = [loss(model).item()]
    for scale in (0.5, 2.0):
        with torch.no_grad():
            for param in model.parameters():
                param.mul_(scale)
        found += [evaluate(model), loss(model).item()]
    return found


def saved_and_loaded(model: nn.Module) -> list[float]:
    optimizer, found = sgd(model), []
    saved: dict[str, Tensor] = {}
    for step in range(2):
        optimizer.zero_grad()
        each = loss(model, step)
        saved = {name: value.detach().clone() for name, value in model.state_dict().items()}
        each.backward()
        optimizer.step()
        found.append(evaluate(model))
    model.load_state_dict(saved)
    return [*found, evaluate(model)]


# Other orders of forward and backward


def two_forwards_before_a_backward(model: nn.Module) -> list[float]:
    """As preference losses do."""
    optimizer, found = sgd(model), []
    for step in range(2):
        optimizer.zero_grad()
        chosen, rejected = loss(model, step), loss(model, step + 1)
        (-F.logsigmoid(chosen - rejected)).backward()
        optimizer.step()
        found += [chosen.item(), rejected.item()]
    return found


def two_backwards_in_another_order(model: nn.Module) -> list[float]:
    optimizer, found = sgd(model), []
    for step in range(2):
        optimizer.zero_grad()
        first, second = loss(model, step), loss(model, step + 1)
        second.backward()
        first.backward()
        optimizer.step()
        found += [first.item(), second.item()]
    return found


def accumulated_with_evaluations(model: nn.Module) -> list[float]:
    """With FSDP2's own switches, where there are any: reduced, or sharded again, with the last micro-batch only."""
    optimizer, found = sgd(model), []
    for switch in ("set_requires_gradient_sync", "set_reshard_after_backward"):
        optimizer.zero_grad()
        for index in range(3):
            getattr(model, switch, lambda _: None)(index == 2)
            (loss(model, index) / 3).backward()
            found.append(evaluate(model))
        found.append(float(nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
    return [*found, evaluate(model)]


def kept_gathered_for_good(model: nn.Module) -> list[float]:
    getattr(model, "set_reshard_after_backward", lambda _: None)(False)
    return [*train(model, 3), evaluate(model)]


# Errors that somebody catches


class Stop(Exception):
    """Raised on every rank alike."""


@contextmanager
def stopping(module: nn.Module, hook: Callable[..., Any], *, in_backward: bool) -> Iterator[None]:
    handle = module.register_full_backward_hook(hook) if in_backward else module.register_forward_pre_hook(hook)
    try:
        yield
    except Stop:
        pass
    finally:
        handle.remove()


def _stop(*_: Any) -> None:
    raise Stop


def errors_on_the_way(model: nn.Module) -> list[float]:
    optimizer, found = sgd(model), []
    for in_backward in (False, True):
        with stopping(model.model.layers[1].mlp, _stop, in_backward=in_backward):
            loss(model, 1).backward()
            found.append(-1.0)  # not reached
        optimizer.zero_grad()
        found += [evaluate(model), *train(model)]
    return found


def identity(model: nn.Module) -> list[float]:
    """What modules show is the same parameters at every moment."""
    before, found = [id(param) for param in model.parameters()], []
    for each in range(2):
        output = loss(model, each)
        found.append([id(param) for param in model.parameters()] == before)
        evaluate(model)
        output.backward()
        found.append([id(param) for param in model.parameters()] == before)
    return found


LOOPS = (
    evaluated_before_the_optimizer_is_made,
    forward_with_gradients_before_the_optimizer_is_made,
    evaluated_in_inference_mode,
    evaluated_between_backward_and_step,
    evaluated_between_forward_and_backward,
    cleared_by_the_model,
    unfrozen_after_an_evaluation,
    averaged_weights,
    moved_by_hand,
    saved_and_loaded,
    two_forwards_before_a_backward,
    two_backwards_in_another_order,
    accumulated_with_evaluations,
    kept_gathered_for_good,
    errors_on_the_way,
    identity,
)
