"""Which plan applies: custom, optimized, Hugging Face, or read off the model's dataflow; in this order, once.

An error in the source that applies is an error: no other source is tried in its place.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.tensor.parallel import ParallelStyle
from transformers import PreTrainedModel

from shardwright.distributed.config import PLAN_FILES
from shardwright.distributed.models.blocks import block_names
from shardwright.distributed.models.huggingface import (
    embedding_name,
    head_name,
    inner_prefix,
    outermost_pretrained,
    plan_styles,
    pretrained,
    text_config,
    text_model,
)
from shardwright.distributed.models.imports import PathError, import_class_from_path
from shardwright.distributed.plan import ParallelPlan, match_names, merge_plans
from shardwright.distributed.planning.adapters import unknown_adapter
from shardwright.distributed.planning.expert_rules import cuts_layers, with_experts
from shardwright.distributed.planning.matching import require_match
from shardwright.distributed.planning.not_cut import NOT_CUT
from shardwright.distributed.plans import optimized_plans
from shardwright.distributed.replay.reading import ModelReading
from shardwright.distributed.runtime.adapted import base_layer
from shardwright.distributed.styles.base import Style
from shardwright.distributed.styles.torch_styles import LAYOUT_ONLY, asks_for_sequence_parallel, style_name
from shardwright.errors import PlanError
from shardwright.untrusted import read_file, shown

logger = logging.getLogger(__name__)

NO_PLAN = "none"  # the source where a model is not to be cut
GATHERED = ("colwise_gather_output", "colwise_rep")

# Globs to styles (torch's objects, or names), a plan, a path to one in YAML or JSON, or a dotted path to a dict or to a
# function that returns one.
CustomPlan = Mapping[str, ParallelStyle | str] | ParallelPlan | str


def choose_plan(reading: ModelReading, brought: Brought | None = None, tp: int = 2) -> ParallelPlan:
    """The tensor-parallel plan of a model; says on rank 0 which source it is from and why.

    Args:
        brought: what the user passed.
        tp: the size that a plan read off the dataflow will be for; the other sources' plans suit any.

    Raises:
        PlanError: a style in the user's plan has no meaning here.
    """
    plan, why = _chosen(reading, brought, tp)
    if not dist.is_initialized() or dist.get_rank() == 0:
        logger.info("Tensor-parallel plan of %s: %s, because %s.", type(reading.model).__name__, plan.source, why)
    return plan


def _chosen(reading: ModelReading, brought: Brought | None, tp: int) -> tuple[ParallelPlan, str]:
    """The plan, and why this one."""
    model = reading.model
    adapter = unknown_adapter(model)
    if brought is not None:
        return brought.for_model(model), "it was passed in"
    if wrapped := _wrapped_models(reading):
        plans = {name: _chosen(ModelReading(inner), None, tp) for name, inner in wrapped.items()}
        merged = merge_plans({name: plan for name, (plan, _) in plans.items()})
        return merged, " and ".join(dict.fromkeys(why for _, why in plans.values()))
    if (reason := NOT_CUT.get(_model_type(model))) is not None:
        notes = (f"no tensor parallelism: {reason}.",)
        return ParallelPlan({}, source=NO_PLAN, notes=notes), "no plan for this model type is exact"
    if adapter is None and (optimized := optimized_plan(model)) is not None:
        return optimized, "Shardwright has a tuned plan for this model type"
    if adapter is None and (huggingface := huggingface_plan(model)) and cuts_layers(model, huggingface):
        return with_experts(model, huggingface, tp), "transformers has a plan for this model's blocks"
    from shardwright.distributed.planning.derive import derive_plan  # not needed by models that have a plan

    plan = with_experts(model, derive_plan(reading, tp=tp), tp)
    if adapter is not None:
        return plan, f"the adapter of {adapter} changes more than a sum, so a plan of the base model does not fit"
    return plan, "neither Shardwright nor transformers has a plan for the layers of this model's blocks"


def _wrapped_models(reading: ModelReading) -> dict[str, PreTrainedModel]:
    """The models of transformers that something was put around, where they hold all of the blocks."""
    found = {name: inner for name, inner in outermost_pretrained(reading.model) if name}
    inside = tuple(f"{name}." for name in found)
    return found if all(block.startswith(inside) for block in reading.blocks) else {}


def _model_type(model: nn.Module) -> str:
    return text_config(model).model_type if pretrained(model) is not None else ""


def brought_plan(custom: CustomPlan) -> Brought:
    """A plan the user passed, in any of its forms: read, and where it is a function, called, once.

    Raises:
        PlanError: it is none of these or cannot be read.
    """
    if isinstance(custom, ParallelPlan):
        return Brought(custom)
    if isinstance(custom, Mapping):
        return Brought(custom, "custom: dict")
    if not isinstance(custom, str):
        raise PlanError(f"A plan must be a dict of globs to styles, or a path to one, not a {type(custom).__name__}.")
    path = Path(custom)
    if path.suffix in PLAN_FILES:
        if not path.is_file():
            raise PlanError(f"There is no plan file {shown(custom)}.")
        text = read_file(path, PlanError)
        return Brought(ParallelPlan.from_json(text) if path.suffix == ".json" else ParallelPlan.from_yaml(text))
    found = _at_path(custom)
    if not isinstance(found, (ParallelPlan, Mapping)):
        raise PlanError(
            f"Custom parallel plan {shown(custom)} is not valid: it is a {type(found).__name__}, and must be a dict of "
            "globs to styles, or a function that returns one."
        )
    return Brought(found, f"custom: {custom}")


@dataclass(frozen=True)
class Brought:
    """What a user passed as a plan: a :class:`ParallelPlan`, or a mapping of globs to styles and where it is from."""

    plan: ParallelPlan | Mapping[str, Any]
    source: str = ""

    @property
    def asks_for_sequence_parallel(self) -> bool:
        """Whether there are torch styles in it that split the residual stream along the sequence."""
        return not isinstance(self.plan, ParallelPlan) and asks_for_sequence_parallel(self.plan.values())

    def for_model(self, model: nn.Module) -> ParallelPlan:
        """The plan itself."""
        if isinstance(self.plan, ParallelPlan):
            return self.plan
        return _plan_from_mapping(model, self.plan, self.source)


def _at_path(name: str) -> Any:
    """What is at a dotted path, or what the function there returns."""
    try:
        found = import_class_from_path(name)
    except PathError as error:
        raise PathError(f"Custom parallel plan {name!r} is not valid: {error}") from error
    return found() if callable(found) else found


def _plan_from_mapping(model: nn.Module, styles: Mapping[str, Any], source: str) -> ParallelPlan:
    names: dict[str, str] = {}
    for glob, style in styles.items():
        if isinstance(style, LAYOUT_ONLY):
            require_match(glob, match_names(glob, dict(model.named_modules())), model, source)
        else:
            names[glob] = style if isinstance(style, str) else style_name(glob, style)
    # Styles that were taken from a plan bring along what it says beside them.
    origins = {
        glob: style.plan for glob, style in styles.items() if isinstance(style, Style) and style.plan is not None
    }
    optional = {glob for glob, plan in origins.items() if glob in plan.optional}
    if not any(match_names(glob, _inside_blocks(model)) for glob in optional):
        optional = set()  # a plan that names nothing in the blocks was made for another model
    attributes = {glob: own for plan in origins.values() for glob, own in plan.local_attributes.items()}
    arguments = {glob: own for plan in origins.values() for glob, own in plan.local_arguments.items()}
    return ParallelPlan(names, frozenset(optional), attributes, arguments, source=source)


def _inside_blocks(model: nn.Module) -> list[str]:
    """The names of all modules and parameters below the blocks."""
    blocks = tuple(f"{block}." for block in block_names(model))
    names = [name for name, _ in (*model.named_modules(), *model.named_parameters(remove_duplicate=False))]
    return [name for name in names if name.startswith(blocks)]


def optimized_plan(model: nn.Module) -> ParallelPlan | None:
    """Shardwright's tuned plan for this model type, where there is one."""
    if pretrained(model) is None:
        return None
    found = optimized_plans().get(text_config(model).model_type)
    if found is None:
        return None
    prefix = f"{name}." if (name := text_model(model)[0]) else ""
    styles = {prefix + glob: style for glob, style in found.styles.items()}
    attributes = {prefix + glob: names for glob, names in found.local_attributes.items()}
    source = f"optimized: {found.family}"
    return ParallelPlan(_with_ends(model, styles), frozenset(styles), attributes, source=source)


def huggingface_plan(model: nn.Module) -> ParallelPlan | None:
    """The plan that transformers brings along, completed; None where it says nothing about the blocks."""
    if pretrained(model) is None:
        return None
    try:
        styles = huggingface_styles(model)
    except PlanError:
        return None
    inside = _inside_blocks(model)
    if not any(match_names(glob, inside) for glob in styles):
        return None
    # transformers writes one plan for all variants of a model, so some globs match nothing in this one.
    return ParallelPlan(styles, frozenset(styles), source="huggingface")


def huggingface_styles(model: nn.Module) -> dict[str, str]:
    """The Hugging Face plan as globs to style names, with the embedding added and the head's logits kept sharded.

    Raises:
        PlanError: the model has no plan.
    """
    return _with_ends(model, plan_styles(model))


def _with_ends(model: nn.Module, styles: dict[str, str]) -> dict[str, str]:
    """A plan with the embedding sharded over the vocabulary where it is missing, and the logits left sharded.

    Other tables of at least its size (Gemma's embeddings for every layer) are cut over the features, which moves less.
    """
    head, embedding = head_name(model), embedding_name(model)
    if head is None and embedding is None:
        return _with_usual_ends(model, styles)
    modules = dict(model.named_modules())
    styles = dict(styles)
    if head is not None and isinstance(base_layer(modules[head]), nn.Linear):
        gathered = {glob: style for glob, style in styles.items() if match_names(glob, [head])}
        if not gathered or set(gathered.values()) <= {*GATHERED, "colwise"}:
            styles = {glob: style for glob, style in styles.items() if glob not in gathered}
            styles[head] = "colwise_logits"
    if embedding is not None and not any(match_names(glob, [embedding]) for glob in styles):
        module = base_layer(modules[embedding])
        if isinstance(module, nn.Embedding) and module.max_norm is None:
            styles[embedding] = "embedding_rowwise"
    for name in _large_tables(model, embedding):
        if not any(match_names(glob, [name]) for glob in styles):
            styles[name] = "embedding_colwise"
    return styles


def _large_tables(model: nn.Module, embedding: str | None) -> list[str]:
    """Untied tables of the text model, outside of its blocks, that are at least as large as its input embedding."""
    text = text_model(model)[0]
    blocks = tuple(f"{block}." for block in block_names(model))
    tables = {name: module for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    if embedding not in tables:
        return []
    owners = Counter(id(param) for module in model.modules() for param in module._parameters.values())
    return [
        name
        for name, table in tables.items()
        if name != embedding
        and name.startswith(f"{text}." if text else "")
        and not name.startswith(blocks)
        and table.weight.numel() >= tables[embedding].weight.numel()
        and owners[id(table.weight)] == 1
        and not (table.max_norm or table.scale_grad_by_freq or table.sparse)
    ]


def _with_usual_ends(model: nn.Module, styles: dict[str, str]) -> dict[str, str]:
    """The same for a model that cannot be asked for its ends: by the names that transformers gives them, when untied.

    Whether a tie would be kept cannot be seen there.
    """
    if getattr(getattr(model, "config", None), "tie_word_embeddings", True):
        return styles
    head = {glob: "colwise_logits" for glob, style in styles.items() if glob == "lm_head" and style in GATHERED}
    return {f"{inner_prefix(model)}.embed_tokens": "embedding_rowwise", **styles, **head}
