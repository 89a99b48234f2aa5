"""Adapters: the style of a layer spread over what PEFT has put around it.

A plan names the layers of the base model. Around an adapted one stands a tuner layer that holds the layer itself
(``base_layer``) and pairs of small ones: ``lora_B(lora_A(x))`` is added to its output (Hu et al. 2021, "LoRA"). The
tuner layer then reads and writes in the place of its base layer, and all inside is this rank's share of the work:

- Where it reads, the base layer and ``lora_B`` are cut on their output. ``lora_A`` is replicated, its gradient summed.
- Where it writes, the base layer and ``lora_A`` are cut on their input. ``lora_B`` is replicated, its gradient summed.
  The sum over the ranks is the one that the base layer alone would need.

So an adapted layer sends as much as the layer does, but for the small sums of gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from shardwright.distributed.planning.resolved import ResolvedPlan, StyleUse
from shardwright.distributed.replay.reading import ModelReading
from shardwright.distributed.runtime.adapted import BASE, DOWN, UP
from shardwright.distributed.styles.replicated import PartOfSum, ReplicatedPartialGradient
from shardwright.errors import PlanError

MAGNITUDE = "lora_magnitude_vector"  # DoRA's, which scales the sum
_PARTS = {BASE, DOWN, UP, MAGNITUDE, "lora_dropout", "lora_embedding_A", "lora_embedding_B"}
PARAMETER = "parameter_name"  # of LoRA's layer around one that is adapted by a parameter: which one it adds to
ORTHOGONAL = "lora_E"  # AdaLoRA's singular values, between matrices that its loss keeps orthogonal
SCALES = "ia3_l"  # IA3's: the tuner layer itself multiplies a layer's input or output with them
# A module that is trained as a whole beside a frozen one: PEFT's ``modules_to_save``.
ORIGINAL, SAVED = "original_module", "modules_to_save"


def unknown_adapter(model: nn.Module) -> str | None:
    """The name of an adapted layer that is not LoRA in its plain form (DoRA, IA3, ...); None where there is none."""
    for name, module in model.named_modules():
        if BASE in module._modules and not _is_lora(module):
            return name
    return None


def _is_lora(module: nn.Module) -> bool:
    parts = module._modules
    if DOWN not in parts or not parts.keys() <= _PARTS or module.__dict__.get("lora_variant"):
        return False
    magnitude = parts.get(MAGNITUDE)
    return magnitude is None or not list(magnitude.children())


def refuse_adapters(model: nn.Module) -> None:
    """Raise PlanError where layers that are about to be cut have adapters that need the whole of them.

    Raises:
        PlanError: IA3; LoRA by ``target_parameters``, on packed experts as a rule; AdaLoRA.
    """
    for name, module in model.named_modules():
        if BASE not in module._modules:
            continue
        why = None
        if SCALES in module._modules:
            why = (
                "an adapter of the kind IA3, which scales the layer's features, and tensor parallelism would leave "
                "each rank a part of them"
            )
        elif PARAMETER in module.__dict__:
            why = (
                f"an adapter on its parameter {module.__dict__[PARAMETER]} (PEFT's target_parameters), which adds a "
                "whole update to a weight of which each rank would hold a part"
            )
        elif ORTHOGONAL in module._modules:
            why = (
                "an adapter of the kind AdaLoRA, whose loss compares whole matrices of the adapter with each other, "
                "and tensor parallelism would leave each rank a part of them"
            )
        if why is not None:
            raise PlanError(f"{name} has {why}. Use dp_shard (FSDP2 shards it exactly), or LoRA by target_modules.")


def adapt(reading: ModelReading, resolved: ResolvedPlan) -> None:
    """Spread the styles of adapted layers over their parts. Styles that were changed since are spread anew."""
    for name, module in reading.modules.items():
        use = resolved.modules.get(name)
        if use is None or use.inside:
            continue
        if ORIGINAL in module._modules and SAVED in module._modules:
            del resolved.modules[name]
            for part in (f"{name}.{ORIGINAL}", *_children(reading, f"{name}.{SAVED}")):
                resolved.modules[part] = use
        elif BASE in module._modules:
            _adapt_layer(reading, name, use, resolved)


def _adapt_layer(reading: ModelReading, name: str, use: StyleUse, resolved: ResolvedPlan) -> None:
    if not use.made.for_adapted:
        # A table: the adapters' own are small, and replicated.
        del resolved.modules[name]
        resolved.modules[f"{name}.{BASE}"] = use
        return
    rule = f"adapter of {name}"
    inside = replace(use, inside=True, rule=rule, origin="adapter", region=None, sequence=False)
    writes = use.made.writes
    resolved.modules[f"{name}.{BASE}"] = inside
    for part in _children(reading, f"{name}.{DOWN}"):
        resolved.modules[part] = inside if writes else StyleUse(ReplicatedPartialGradient.name, {}, rule, "adapter")
    for part in _children(reading, f"{name}.{UP}"):
        resolved.modules[part] = StyleUse(PartOfSum.name, {}, rule, "adapter") if writes else inside


def _children(reading: ModelReading, name: str) -> Iterator[str]:
    yield from (f"{name}.{child}" for child in reading.modules[name]._modules) if name in reading.modules else ()
