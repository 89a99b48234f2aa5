"""What is done once per machine before training: the config, the tokenizer and the packed tokens, in a folder.

The *job folder* is all that a rank needs. Whatever is wrong with the text, the tokenizer or the model's config comes
out here, in one process, before there are ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from shardwright.errors import ConfigError
from shardwright.train.config import DataSettings, TrainConfig
from shardwright.train.dataset import TOKENS, write_packed, write_separate
from shardwright.train.model import check_fit, model_config
from shardwright.train.text import find_files, read_texts
from shardwright.train.tokenizer import load_tokenizer, train_tokenizer

CONFIG = "config.yaml"
TOKENIZER = "tokenizer"
_TEXTS_AT_ONCE = 512

Say = Callable[[str], None]


def prepare(config: TrainConfig, folder: Path, say: Say) -> None:
    """Fill the job folder.

    Args:
        folder: an empty folder.
        say: told, in a sentence each, what was done.

    Raises:
        ConfigError: the text, tokenizer or model config cannot be used; the message has the numbers.
    """
    files = find_files(config.data)
    tokenizer = _tokenizer(config, files)
    check_fit(model_config(config.model, tokenizer), tokenizer, config.data.sequence_length)
    tokenizer.save_pretrained(folder / TOKENIZER)
    write = write_packed if config.data.pack else write_separate
    tokens = encode(read_texts(files, config.data.text_key), tokenizer)
    shape, total = write(tokens, folder, config.data.sequence_length)
    _require_enough(config.data, shape.sequences, total, len(files))
    (folder / CONFIG).write_text(config.to_yaml())
    size = sum(file.stat().st_size for file in files) / 1e6
    say(
        f"{len(files):,} files, {size:.1f} MB: {total:,} tokens of a vocabulary of {len(tokenizer):,}, "
        f"{shape.sequences:,} sequences of {shape.sequence_length}"
    )


def _tokenizer(config: TrainConfig, files: Sequence[Path]) -> PreTrainedTokenizerBase:
    if config.tokenizer.vocab_size is not None:
        return train_tokenizer(read_texts(files, config.data.text_key), config.tokenizer.vocab_size)
    folder = config.tokenizer.path or config.model.path
    assert folder is not None, "TrainConfig requires one of the three"
    return load_tokenizer(folder)


def encode(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """The tokens of each text, with the end-of-text token after it, where the tokenizer has one."""
    end = tokenizer.eos_token_id
    for group in in_groups(texts):
        for tokens in tokenizer(group, return_attention_mask=False, verbose=False)["input_ids"]:
            if end is not None and (not tokens or tokens[-1] != end):
                tokens.append(end)
            yield tokens


def in_groups(texts: Iterable[str]) -> Iterator[list[str]]:
    """Groups of texts, large enough for a fast tokenizer to use all cores and small enough for memory."""
    iterator = iter(texts)
    while group := list(islice(iterator, _TEXTS_AT_ONCE)):
        yield group


def _require_enough(data: DataSettings, sequences: int, tokens: int, files: int) -> None:
    needed = data.validation + 1
    if sequences < needed:
        held = f" and {data.validation} more to hold out (data.validation)" if data.validation else ""
        given = "1 file gives" if files == 1 else f"{files:,} files give"
        raise ConfigError(
            f"The text is too short: {given} {tokens:,} tokens, which make {sequences} sequences of "
            f"data.sequence_length = {data.sequence_length}; training needs at least 1{held}. Give more text, or "
            "lower data.sequence_length or data.validation."
        )


def digest(folder: Path) -> str:
    """A fingerprint of the rows in the job folder, to tell whether two machines prepared the same data."""
    with (folder / TOKENS).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
