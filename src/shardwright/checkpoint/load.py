"""``load_pretrained``: from a folder of safetensors to a sharded model, each rank reading what it owns.

meta -> parallelize -> empty shards -> slices read into them -> buffers computed -> checked.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedConfig, PreTrainedModel

from shardwright._transformers import set_conversions
from shardwright.api import parallelize
from shardwright.checkpoint.adapted import AdaptedInitialiser, Adapters, put_adapters
from shardwright.checkpoint.conversion import plan_load
from shardwright.checkpoint.description import GENERATION, read_generation_config
from shardwright.checkpoint.fill import check_complete, check_fit, fill_from_folder, fill_the_rest, to_empty
from shardwright.checkpoint.folder import INDEX, open_folder
from shardwright.checkpoint.initial import Initial, Initialiser
from shardwright.checkpoint.manifest import MANIFEST, require_listed, verify
from shardwright.checkpoint.source import class_in, local_folder, read_config
from shardwright.checkpoint.together import rank_and_world, same_error_everywhere
from shardwright.distributed.config import ParallelConfig
from shardwright.distributed.mesh import make_mesh
from shardwright.distributed.models.build import build_on_meta
from shardwright.distributed.models.config_json import CONFIG
from shardwright.distributed.runtime.layout import whole
from shardwright.errors import CheckpointError


def load_pretrained(
    path: str | Path,
    config: ParallelConfig,
    mesh: DeviceMesh | None = None,
    *,
    model_class: type[Any] | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    checksums: bool = True,
    **kwargs: Any,
) -> PreTrainedModel:
    """A sharded model with the weights in ``path``; every rank reads the slices it owns and nothing else.

    Collective: every rank calls it. Host memory on top of the shards: a buffer of 4 MB (where transformers'
    conversion rule for a weight computes values, instead of only putting tensors together: that one whole weight).
    Afterwards no tensor is on meta or uninitialised, and tied weights are tied. Entries of the files that the model
    does not use are logged as a warning.

    Args:
        path: a folder with ``config.json`` and safetensors files, or the name of a repository on the hub.
        config: how to spread the model.
        mesh: from :func:`shardwright.distributed.mesh.make_mesh`; None makes it.
        model_class: an Auto class or a model class; None takes the one that ``config.json`` names.
        dtype: of the parameters; None takes the one that ``config.json`` names. Values are converted while reading.
        revision: of a repository on the hub: a branch, tag or commit.
        trust_remote_code: run model code that comes with the folder.
        checksums: first compare the files with the checksums that :func:`save_pretrained` has left in the folder (other
            folders have none); each rank reads its share of them in whole for that.
        kwargs: for the model's class, for example ``attn_implementation="sdpa"``.

    Returns:
        The model on this rank's device, in evaluation mode as transformers returns it.

    Raises:
        CheckpointError: damaged or missing files, weights that the model needs and the files lack, other shapes; on
            every rank alike, before any weight is read unless the damage lies in the values.
        ConfigError, PlanError, UnsupportedError: what :func:`shardwright.parallelize` refuses; quantised weights.
    """
    return _load(path, config, mesh, model_class, dtype, revision, trust_remote_code, checksums, None, kwargs)


def load_adapted(
    path: str | Path,
    adapters: Any,
    config: ParallelConfig,
    mesh: DeviceMesh | None = None,
    *,
    seed: int = 0,
    model_class: type[Any] | None = None,
    dtype: torch.dtype | None = None,
    **kwargs: Any,
) -> Any:
    """A sharded model with the weights in ``path`` and new adapters on it; no rank holds more than its shards.

    Args: as for :func:`load_pretrained`.
        adapters: PEFT's ``LoraConfig``: plain or rank-stabilised, with DoRA, modules to save and, unless tensor or
            expert parallelism cuts them, parameters of packed experts (``target_parameters``).
        seed: the adapters' first values follow from it, and not from the mesh.

    Returns:
        PEFT's model on this rank's device, in evaluation mode. Adapters have the base model's dtype.

    Raises:
        ConfigError: PEFT cannot put these adapters on this model.
        UnsupportedError: adapters of another kind.
        CheckpointError, PlanError: as :func:`load_pretrained`.
    """
    return _load(path, config, mesh, model_class, dtype, None, False, True, Adapters(adapters, seed), kwargs)


def _load(
    path: str | Path,
    config: ParallelConfig,
    mesh: DeviceMesh | None,
    model_class: type[Any] | None,
    dtype: torch.dtype | None,
    revision: str | None,
    trust_remote_code: bool,
    checksums: bool,
    adapters: Adapters | None,
    kwargs: dict[str, Any],
) -> Any:
    mesh = make_mesh(config) if mesh is None else mesh
    with same_error_everywhere(f"Loading {path}"):
        folder = local_folder(path, revision, trust_remote_code)
        entries = open_folder(folder)
        if checksums and (folder / MANIFEST).is_file():
            _compare_checksums(folder, {entry.file for entry in entries.values()}, trust_remote_code)
        model_config = read_config(folder, trust_remote_code)
        cls = model_class or class_in(folder, model_config, trust_remote_code)
        skeleton = build_on_meta(model_config, cls, dtype, **kwargs)
        plan = plan_load(skeleton, entries)
        check_fit(plan, skeleton, folder, entries)
        model: Any = build_on_meta(model_config, cls, dtype, **kwargs)
        model.generation_config = read_generation_config(folder) or model.generation_config
        initial: Initial = Initialiser(skeleton)
        reference: nn.Module = skeleton
        set_conversions(model, plan.conversions)  # where transformers and save_pretrained look for them
        if adapters is not None:
            model.name_or_path = str(path)  # the adapter's folder names its base model
            model, names = put_adapters(model, adapters.config)
            plan = plan.renamed({old: new for new, old in names.items()})
            reference, _ = put_adapters(build_on_meta(model_config, cls, dtype, **kwargs), adapters.config)
            initial = AdaptedInitialiser(reference, names, initial, partial(_whole_value, model), adapters.seed)
    model = _empty_shards(model, config, mesh)
    with same_error_everywhere(f"Loading {path}"):
        fill_from_folder(model, folder, entries, plan)
        fill_the_rest(model, initial, set(plan.readings))
        check_complete(model, reference)
    return model.eval()


def _whole_value(model: nn.Module, name: str) -> Tensor:
    """A parameter of a sharded model in one piece; every rank calls it."""
    return whole(model.get_parameter(name).detach())


def _compare_checksums(folder: Path, weights: set[str], with_code: bool) -> None:
    """Code that is not run may be missing: it is not fetched from a hub. What is read must be in the manifest."""
    try:
        verify(folder, *rank_and_world(), without=() if with_code else (".py",))
        require_listed(folder, [CONFIG, GENERATION, INDEX, *sorted(weights)])
    except CheckpointError as error:
        raise CheckpointError(
            f"{error} Copy the folder again; or, where its weights were replaced on purpose, remove its {MANIFEST}."
        ) from error


def init_pretrained(
    model_config: PreTrainedConfig,
    config: ParallelConfig,
    mesh: DeviceMesh | None = None,
    *,
    seed: int = 0,
    model_class: type[Any] | None = None,
    dtype: torch.dtype | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """A sharded model with random weights that depend on ``seed`` and not on the mesh.

    Every weight is drawn whole on the CPU, with a generator seeded from ``seed`` and its name, by the model's own
    ``_init_weights``; each rank then keeps its part. Host memory on top of the shards: the largest single weight.

    Args: as for :func:`load_pretrained`; ``model_config`` is a transformers config.

    Returns:
        The model on this rank's device, in training mode.

    Raises:
        UnsupportedError: the model has a weight that its ``_init_weights`` does not initialise.
        ConfigError, PlanError: what :func:`shardwright.parallelize` refuses.
    """
    mesh = make_mesh(config) if mesh is None else mesh
    with same_error_everywhere("Building the model"):
        skeleton = build_on_meta(model_config, model_class, dtype, **kwargs)
        model = build_on_meta(model_config, model_class, dtype, **kwargs)
    model = _empty_shards(model, config, mesh)
    with same_error_everywhere("Initialising the model"):
        fill_the_rest(model, Initialiser(skeleton, seed), set())
        check_complete(model, skeleton)
    return model.train()


def init_whole(
    model_config: PreTrainedConfig,
    *,
    seed: int = 0,
    model_class: type[Any] | None = None,
    dtype: torch.dtype | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """The model that :func:`init_pretrained` makes of the same arguments, in one piece, in CPU memory of this process.

    Raises:
        UnsupportedError: the model has a weight that its ``_init_weights`` does not initialise.
        ConfigError: no model can be made from these values.
    """
    skeleton = build_on_meta(model_config, model_class, dtype, **kwargs)
    model = build_on_meta(model_config, model_class, dtype, **kwargs)
    to_empty(model, "cpu")
    fill_the_rest(model, Initialiser(skeleton, seed), set())
    check_complete(model, skeleton)
    return model.train()


def _empty_shards(model: Any, config: ParallelConfig, mesh: DeviceMesh) -> Any:
    parallelize(model, config, mesh)  # in place
    if config.engine == "fsdp2":  # Megatron-FSDP takes a model off meta while it shards it
        kind = mesh.device_type
        to_empty(model, torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else kind)
    return model
