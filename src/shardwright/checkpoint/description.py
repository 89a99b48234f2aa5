"""All of a model folder but its weights, read: generation config and tokenizer. Written in :mod:`.save`."""

from __future__ import annotations

import stat
from pathlib import Path

from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from shardwright.errors import ConfigError
from shardwright.untrusted import ToldAs, read_json, shown

GENERATION = "generation_config.json"
_MOST_BYTES = 128 * 2**20  # of a tokenizer's file; the largest vocabularies of 2026 have 40 MB
# What transformers reads of a tokenizer. Code (*.py) only where it is trusted; weights never.
_TOKENIZER_FILES = (".json", ".txt", ".model", ".jinja", ".tiktoken")


def read_generation_config(folder: Path) -> GenerationConfig | None:
    """The generation config in ``folder``; None where there is none.

    Raises:
        ConfigError: it is damaged.
    """
    file = folder / GENERATION
    if not file.is_file():
        return None
    values = read_json(file, ConfigError, limit=2**20)
    if not isinstance(values, dict):
        raise ConfigError(f"{file} must hold a mapping of keys to values; it holds {shown(values)}.")
    with ToldAs(ConfigError, f"transformers cannot read {file}"):
        return GenerationConfig.from_pretrained(folder, local_files_only=True)


def read_tokenizer(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer saved in ``folder``; nothing is looked up on a network.

    Args:
        trust_remote_code: run tokenizer code that is in the folder.

    Raises:
        ConfigError: none there, or one that is damaged.
    """
    with ToldAs(ConfigError, f"The folder {folder} holds no tokenizer that transformers can load"):
        _require_bounded(folder)
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)


def _require_bounded(folder: Path) -> None:
    """Raises ConfigError for a pipe or a file of a size that no tokenizer has, among what transformers may open."""
    for file in sorted(folder.iterdir()):
        found = file.stat()
        if file.suffix not in _TOKENIZER_FILES or stat.S_ISDIR(found.st_mode):
            continue
        if not stat.S_ISREG(found.st_mode):
            raise ConfigError(f"{file} is no regular file, so it is not read.")
        if found.st_size > _MOST_BYTES:
            raise ConfigError(f"{file} has {found.st_size:,} bytes; a tokenizer is read up to {_MOST_BYTES:,}.")
