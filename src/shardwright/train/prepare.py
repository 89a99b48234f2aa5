"""What is done once per machine before training: the config, the tokenizer and the packed tokens, in a folder.

The *job folder* is all that a rank needs. Whatever is wrong with the text, the tokenizer or the model's config comes
out here, in one process, before there are ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from shardwright.errors import ConfigError
from shardwright.train.config import JOB_CONFIG, DataSettings, TrainConfig
from shardwright.train.dataset import TOKENS, Tokens, write_packed, write_separate
from shardwright.train.find import find_files
from shardwright.train.model import check_fit, model_config
from shardwright.train.text import PIECE, Piece, read_texts
from shardwright.train.tokenizer import load_tokenizer, train_tokenizer
from shardwright.untrusted import ToldAs

TOKENIZER = "tokenizer"
_PIECES_AT_ONCE = 512
_CHARACTERS_AT_ONCE = 4 * PIECE

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
    (folder / JOB_CONFIG).write_text(config.to_yaml())
    size = sum(file.stat().st_size for file in files) / 1e6
    say(
        f"{len(files):,} files, {size:.1f} MB: {total:,} tokens of a vocabulary of {len(tokenizer):,}, "
        f"{shape.sequences:,} sequences of {shape.sequence_length}"
    )


def _tokenizer(config: TrainConfig, files: Sequence[Path]) -> PreTrainedTokenizerBase:
    if config.tokenizer.vocab_size is not None:
        texts = (piece.text for piece in read_texts(files, config.data.text_key))
        return train_tokenizer(texts, config.tokenizer.vocab_size)
    folder = config.tokenizer.path or config.model.path
    assert folder is not None, "TrainConfig requires one of the three"
    return load_tokenizer(folder)


def encode(texts: Iterable[Piece], tokenizer: PreTrainedTokenizerBase) -> Iterator[Tokens]:
    """The tokens of texts that come in pieces: those of the whole text, with the end-of-text token after it, where the
    tokenizer has one.

    A piece that does not begin its text is tokenized once with the characters before it and once they alone: the tokens
    that come on top are its own. So no piece gets what a tokenizer puts before the first word of a text.
    """
    first, final = _around(tokenizer)
    end = tokenizer.eos_token_id
    for group in in_groups(texts):
        parts = [piece for piece in group if not piece.is_whole]
        whole = iter(_ids(tokenizer, [piece.text for piece in group if piece.is_whole], special=True))
        joined = iter(_ids(tokenizer, [piece.before + piece.text for piece in parts]))
        before = iter(_ids(tokenizer, [piece.before for piece in parts]))
        for piece in group:
            if piece.is_whole:
                own = next(whole)
            else:
                own = _without(next(before), next(joined)) or _ids(tokenizer, [piece.text])[0]
                own = [*(() if piece.before else first), *own, *(final if piece.last else ())]
            if piece.last and end is not None and (not own or own[-1] != end):
                own.append(end)
            yield Tokens(np.asarray(own, dtype=np.int32), piece.last)


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str], special: bool = False) -> list[list[int]]:
    if not texts:
        return []
    with ToldAs(ConfigError, "The tokenizer cannot be used"):
        told = tokenizer(texts, add_special_tokens=special, return_attention_mask=False, verbose=False)
        return [list(ids) for ids in told["input_ids"]]


def _without(before: list[int], joined: list[int]) -> list[int] | None:
    """``joined`` without the tokens ``before`` at its beginning; None where others are there."""
    return joined[len(before) :] if joined[: len(before)] == before else None


def _around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after the tokens of a text."""
    (plain,), (full,) = _ids(tokenizer, ["a"]), _ids(tokenizer, ["a"], special=True)
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start], full[start + len(plain) :]
    return [], []


def in_groups(texts: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Groups of pieces, large enough for a fast tokenizer to use all cores and small enough for memory."""
    group: list[Piece] = []
    size = 0
    for piece in texts:
        if group and (size + len(piece.text) > _CHARACTERS_AT_ONCE or len(group) == _PIECES_AT_ONCE):
            yield group
            group, size = [], 0
        group.append(piece)
        size += len(piece.text)
    if group:
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
