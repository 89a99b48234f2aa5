"""What transformers says about a model: its text config, its heads, its embeddings and its tensor-parallel plan."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from shardwright._transformers import own_tp_plan
from shardwright.errors import PlanError


def pretrained(model: nn.Module) -> tuple[str, PreTrainedModel] | None:
    """The model of transformers that ``model`` is or wraps (PEFT, a value head), and its name; None where it does not.

    Of several beside each other, the one with the most parameters.
    """
    return max(outermost_pretrained(model), key=lambda pair: pair[1].num_parameters(), default=None)


def outermost_pretrained(model: nn.Module) -> list[tuple[str, PreTrainedModel]]:
    """The models of transformers in ``model``, with their names, those inside of others left out."""
    found: list[tuple[str, PreTrainedModel]] = []
    for name, module in _named_modules(model):
        inside = any(not outer or name.startswith(f"{outer}.") for outer, _ in found)
        if isinstance(module, PreTrainedModel) and not inside:
            found.append((name, module))
    return found


def _named_modules(model: Any) -> Iterable[tuple[str, nn.Module]]:
    return model.named_modules() if isinstance(model, nn.Module) else ()


def _below(prefix: str, name: str) -> str:
    return ".".join(part for part in (prefix, name) if part)


def text_config(model: nn.Module) -> Any:
    """The config that describes the text model: a multimodal model's sub-config; None for a model without a config."""
    found = pretrained(model)
    config = found[1].config if found is not None else getattr(model, "config", None)
    return config.get_text_config() if isinstance(config, PreTrainedConfig) else getattr(config, "text_config", config)


def rotary_key_width(model: nn.Module) -> int | None:
    """Features of the rotary key of multi-head latent attention, as the config states it."""
    width = getattr(text_config(model), "qk_rope_head_dim", None)
    return width if isinstance(width, int) else None


# What transformers' configs call the number of experts that see a token.
_EXPERTS_PER_TOKEN = (
    "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts",
)  # fmt: skip


def experts_per_token(model: nn.Module) -> int:
    """How many experts see a token, as the config states it; 0 where it does not."""
    config = text_config(model)
    values = config.to_dict() if isinstance(config, PreTrainedConfig) else {}
    return next((values[key] for key in _EXPERTS_PER_TOKEN if isinstance(values.get(key), int)), 0)


def text_model(model: nn.Module) -> tuple[str, nn.Module]:
    """The inner text model and its name: the model that owns the input embeddings.

    For a model that is its own text model, or that transformers knows nothing of, ``("", model)``.
    """
    found = pretrained(model)
    if found is None:
        return "", model
    prefix, outer = found
    embeddings = _input_embeddings(outer)
    owners = [
        (_below(prefix, name), module)
        for name, module in outer.named_modules()
        if embeddings is not None
        and isinstance(module, PreTrainedModel)
        and any(child is embeddings for child in module.modules())
    ]
    return owners[-1] if owners else found


def embedding_name(model: nn.Module) -> str | None:
    """The name of the input embedding, where the model says which it is."""
    found = pretrained(model)
    return None if found is None else _name_of(model, _input_embeddings(found[1]))


def _input_embeddings(model: PreTrainedModel) -> nn.Module | None:
    try:
        return model.get_input_embeddings()
    except NotImplementedError:  # transformers could not tell, and the model's class does not say
        return None


def head_name(model: nn.Module) -> str | None:
    """The name of the output head (the layer whose output is the logits), where the model says which it is."""
    found = pretrained(model)
    return None if found is None else _name_of(model, found[1].get_output_embeddings())


def _name_of(model: nn.Module, module: nn.Module | None) -> str | None:
    return (
        next((name for name, found in model.named_modules() if found is module), None) if module is not None else None
    )


def plan_styles(model: nn.Module) -> dict[str, str]:
    """The plan that the model brings along, as globs over the whole model's module names.

    Class plan, then instance plan, then the inner text model's with its prefix; later ones win. Where the model cannot
    be asked for its text model (it is not transformers', but has a ``_tp_plan``): those of all models inside it.

    Raises:
        PlanError: the model has none.
    """
    name, outer = pretrained(model) or ("", model)
    own = {**own_tp_plan(type(outer)), **own_tp_plan(outer)}
    styles = {_below(name, glob): style for glob, style in own.items()}
    for prefix, inner in _inner_models(model).items():
        styles |= {_below(prefix, glob): style for glob, style in own_tp_plan(inner).items()}
    if not styles:
        raise PlanError(
            f"Hugging Face tp plan is not supported for {type(model).__name__}: it has no tensor-parallel plan of its "
            "own. Pass tp_shard_plan (a dict of globs over module names to styles), or use tp=1."
        )
    return styles


def inner_prefix(model: nn.Module) -> str:
    """The name of the innermost model that brings a plan along; transformers' ``model`` where none does."""
    return next(reversed(_inner_models(model)), "") or "model"


def _inner_models(model: nn.Module) -> dict[str, nn.Module]:
    found = pretrained(model)
    if found is not None and _input_embeddings(found[1]) is not None:
        return dict([text_model(model)])
    return {name: module for name, module in _named_modules(model) if name and own_tp_plan(module)}
