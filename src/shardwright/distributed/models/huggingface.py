"""What transformers says about a model: its text config, its heads, its embeddings and its tensor-parallel plan."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from shardwright.errors import PlanError


def text_config(model: nn.Module) -> Any:
    """The config that describes the text model: a multimodal model's sub-config; None for a model without a config."""
    config = getattr(model, "config", None)
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


def text_model(model: PreTrainedModel) -> tuple[str, PreTrainedModel]:
    """The inner text model and its name: the model that owns the input embeddings.

    For a model that is its own text model, ``("", model)``.
    """
    embeddings = _input_embeddings(model)
    owners = [
        (name, module)
        for name, module in model.named_modules()
        if embeddings is not None
        and isinstance(module, PreTrainedModel)
        and any(child is embeddings for child in module.modules())
    ]
    return owners[-1] if owners else ("", model)


def embedding_name(model: nn.Module) -> str | None:
    """The name of the input embedding, where the model says which it is."""
    return _name_of(model, _input_embeddings(model)) if isinstance(model, PreTrainedModel) else None


def _input_embeddings(model: PreTrainedModel) -> nn.Module | None:
    try:
        return model.get_input_embeddings()
    except NotImplementedError:  # transformers could not tell, and the model's class does not say
        return None


def head_name(model: nn.Module) -> str | None:
    """The name of the output head (the layer whose output is the logits), where the model says which it is."""
    return _name_of(model, model.get_output_embeddings()) if isinstance(model, PreTrainedModel) else None


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
    styles = {**_own_plan(type(model)), **_own_plan(model)}
    for prefix, inner in _inner_models(model).items():
        styles |= {f"{prefix}.{glob}" if prefix else glob: style for glob, style in _own_plan(inner).items()}
    if not styles:
        raise PlanError(
            f"Hugging Face tp plan is not supported for {type(model).__name__}: it has no tensor-parallel plan of its "
            "own. Pass tp_shard_plan (a dict of globs over module names to styles), or use tp=1."
        )
    return styles


def inner_prefix(model: nn.Module) -> str:
    """The name of the innermost model that brings a plan along; transformers' ``model`` where none does."""
    return next(reversed(_inner_models(model)), "") or "model"


def _own_plan(model: Any) -> dict[str, str]:
    return getattr(model, "_tp_plan", None) or {}


def _inner_models(model: nn.Module) -> dict[str, nn.Module]:
    if isinstance(model, PreTrainedModel) and _input_embeddings(model) is not None:
        return dict([text_model(model)])
    modules = model.named_modules() if isinstance(model, nn.Module) else ()
    return {name: module for name, module in modules if name and _own_plan(module)}
