"""From what a user calls a model (a folder, a file, a type) to its config, its class, and the model on meta.

Nothing is downloaded and no weight is read or allocated: a model of 405 billion parameters takes a few seconds.
"""

from __future__ import annotations

import difflib
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
)

from shardwright._transformers import kept_in_float32, make_from_config
from shardwright.distributed.models.config_json import read_config_json
from shardwright.errors import ConfigError
from shardwright.untrusted import ToldAs, shown

_CLASSES = (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
)
# The largest types of transformers have about 50,000; building takes some 60 microseconds for each.
_MODULES = 100_000


def load_config(
    model: str | os.PathLike[str] | PreTrainedConfig,
    completed: Mapping[str, Mapping[str, Any]] | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedConfig:
    """The config of a checkpoint folder, a ``config.json`` or a model type of transformers (its default config).

    Args:
        completed: values for the default configs of model types that need some.
        trust_remote_code: run the code of a config class that comes with the folder.

    Raises:
        ConfigError: ``model`` is none of these, or its config does not load.
    """
    if isinstance(model, PreTrainedConfig):
        return model
    path = Path(model)
    if path.exists():
        return _from_path(path, trust_remote_code)
    name = str(model)
    if name not in CONFIG_MAPPING:
        raise ConfigError(_no_such_model(name))
    what, hint = f"The default config of model type {name!r} is not valid by itself", " Pass a config.json instead."
    with ToldAs(ConfigError, what, hint):
        return CONFIG_MAPPING[name](**(completed or {}).get(name, {}))


def _no_such_model(name: str) -> str:
    if os.sep in name or name.endswith(".json"):
        return (
            f"There is no {name} (looked from {Path.cwd()}). Nothing is downloaded: for a model of the Hub, download "
            "its config.json first."
        )
    close = difflib.get_close_matches(name, list(CONFIG_MAPPING), n=3)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    return (
        f"{name!r} is no folder with a checkpoint, no config.json and no model type of the installed transformers "
        f"{transformers.__version__}.{hint}"
    )


def _from_path(path: Path, trust_remote_code: bool) -> PreTrainedConfig:
    values = read_config_json(path, trust_remote_code)
    if "auto_map" in values and values.get("model_type") not in CONFIG_MAPPING and not trust_remote_code:
        raise ConfigError(
            f"{values.get('model_type')!r}, the type of the model in {path}, is not in the installed transformers "
            f"{transformers.__version__}; its code comes with the folder. Read it; if you trust it, use "
            "load_pretrained(..., trust_remote_code=True)."
        )
    with ToldAs(ConfigError, f"transformers cannot read the model config in {path}"):
        return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=trust_remote_code)


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that a config was saved with; else the one that transformers makes from it.

    Image-text-to-text models come before causal language models, those before encoder-decoders and bare models.

    Raises:
        ConfigError: transformers has none.
    """
    for name in config.architectures or ():
        with ToldAs(ConfigError, f"transformers cannot import the class {shown(name)} that the config names"):
            found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    if found := class_of_type(config, _CLASSES):
        return found
    raise ConfigError(
        f"The installed transformers {transformers.__version__} has no model for a {type(config).__name__} "
        f"(architectures: {config.architectures})."
    )


def class_of_type(config: PreTrainedConfig, mappings: Iterable[Any]) -> type[PreTrainedModel] | None:
    """The model class for configs of this type in the first of transformers' ``mappings`` that has one."""
    for mapping in mappings:
        if type(config) in mapping:
            found: Any = mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    return None


def build_on_meta(
    config: PreTrainedConfig,
    cls: type[Any] | None = None,
    dtype: torch.dtype | str | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """The model of ``config`` on the meta device: names, shapes, dtypes and ties, no memory.

    Args:
        config: not changed, but for the dtype that transformers notes in it.
        cls: a model class or one of transformers' Auto classes; None takes :func:`model_class`'s.
        dtype: of the parameters, but for those that transformers keeps in float32 (some routers and norms); None
            takes the one that ``config`` names, or float32.
        kwargs: for the model's class, for example ``attn_implementation``.

    Raises:
        ConfigError: no model can be made from these values.
    """
    chosen: Any = cls or model_class(config)
    wanted: Any = dtype or config.dtype or torch.float32
    kept: Any = vars(torch).get(wanted) if isinstance(wanted, str) else wanted
    make = partial(make_from_config, chosen) if issubclass(chosen, PreTrainedModel) else chosen.from_config
    if not isinstance(kept, torch.dtype) or not kept.is_floating_point:
        raise ConfigError(
            f"The dtype of the model is {shown(wanted)}; it must be one of torch's floating-point dtypes."
        )
    with (
        ToldAs(ConfigError, f"{chosen.__name__} cannot be made from this {config.model_type} config"),
        _at_most(_MODULES),
        torch.device("meta"),
    ):
        model = make(config, dtype=kept, **kwargs)
    _keep_in_float32(model, kept)
    return model


def _keep_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    patterns = [re.compile(pattern.replace("*", ".*")) for pattern in kept_in_float32(model, dtype)]
    for path, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and any(pattern.search(f"{path}.{key}") for pattern in patterns):
                value = parameter.to(torch.float32)
                module._parameters[key] = nn.Parameter(value, requires_grad=parameter.requires_grad)


@contextmanager
def _at_most(modules: int) -> Iterator[None]:
    """Inside, a model of more than so many modules is refused while it is built, and not waited for."""
    made = itertools.count(1)

    def count(*_: object) -> None:
        if next(made) > modules:
            raise ConfigError(
                f"The config describes a model of more than {modules:,} modules, so it is not built. Look at its "
                "numbers of layers and experts."
            )

    hook = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()
