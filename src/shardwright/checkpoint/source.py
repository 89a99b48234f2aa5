"""From what a user names to the folder, the config and the model class: of this machine, or fetched from the hub."""

from __future__ import annotations

import re
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import WeakFileLock
from transformers import PreTrainedConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.utils.hub import HF_MODULES_CACHE

from shardwright.distributed.models.build import load_config, model_class
from shardwright.errors import CheckpointError, ConfigError, UnsupportedError
from shardwright.untrusted import usable_path

_HTTPError: type[Exception] = HfHubHTTPError.__bases__[0]  # of the HTTP library that huggingface_hub is built on
_WANTED = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")
_CODE = ("*.py",)


def local_folder(path: str | Path, revision: str | None = None, trust_remote_code: bool = False) -> Path:
    """``path`` itself where it is a folder; otherwise the hub's copy of the repository of that name.

    Only safetensors, JSON and tokenizer files are fetched, and Python files where ``trust_remote_code`` is set. What
    an earlier call has fetched is used without a network.

    Raises:
        CheckpointError: neither a folder nor a name of a repository that can be reached.
    """
    found = usable_path(path, "The model folder", CheckpointError)
    if found.is_dir():
        return found
    if not isinstance(path, str) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path):
        raise CheckpointError(f"There is no folder {path} (looked from {Path.cwd()}).")
    wanted = [*_WANTED, *(_CODE if trust_remote_code else ())]
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, _HTTPError, OSError) as error:
        what = " ".join(str(error).split())
        raise CheckpointError(
            f"There is no folder {path} (looked from {Path.cwd()}), and fetching a repository of that name from the "
            f"hub failed: {what} Where there is no network, copy the folder here and pass its path."
        ) from error


def read_config(folder: Path, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The transformers config in ``folder``.

    Raises:
        ConfigError: none there, or none that this transformers understands.
        UnsupportedError: the weights are quantised.
    """
    with _one_process_at_a_time(trust_remote_code):
        config = load_config(folder, trust_remote_code=trust_remote_code)
    if "quantization_config" in config.to_dict():
        raise UnsupportedError(
            f"The weights in {folder} are quantised ({config.to_dict()['quantization_config']}). Dequantise them with "
            "transformers first: sharded loading keeps every weight as it is in the file."
        )
    return config


def class_in(folder: Path, config: PreTrainedConfig, trust_remote_code: bool = False) -> type[Any]:
    """The class of the model in ``folder``: transformers' own, or the one whose code the folder brings.

    Raises:
        ConfigError: neither, or the code cannot be imported.
    """
    own: dict[str, Any] = getattr(config, "auto_map", None) or {}
    models = {auto: place for auto, place in own.items() if auto.startswith("AutoModel") and isinstance(place, str)}
    named = [auto for auto, place in models.items() if place.rpartition(".")[2] in (config.architectures or ())]
    auto = next(iter([*named, *models]), None)
    if auto is None or not trust_remote_code:
        return model_class(config)
    try:
        with _one_process_at_a_time(True):
            found: type[Any] = get_class_from_dynamic_module(models[auto], str(folder))
    except (OSError, ImportError, AttributeError, SyntaxError) as error:
        raise ConfigError(f"The code of {models[auto]} in {folder} cannot be imported: {error}.") from error
    found.register_for_auto_class(auto)  # so that saving the model saves its code
    return found


@contextmanager
def _one_process_at_a_time(needed: bool) -> Generator[None, None, None]:
    """transformers copies code into its cache file by file: no rank may import what another one is still writing."""
    if not needed:
        yield
        return
    cache = Path(HF_MODULES_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(cache / ".shardwright.lock"):
        yield
