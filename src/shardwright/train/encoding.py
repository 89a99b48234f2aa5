"""From text to tokens, a piece at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from transformers import PreTrainedTokenizerBase

from shardwright.errors import ConfigError
from shardwright.train.dataset import Tokens
from shardwright.train.text import PIECE, Piece
from shardwright.untrusted import ToldAs

_PIECES_AT_ONCE = 512
_CHARACTERS_AT_ONCE = 4 * PIECE


def encode(texts: Iterable[Piece], tokenizer: PreTrainedTokenizerBase) -> Iterator[Tokens]:
    """The tokens of texts that come in pieces: those of the whole text, with the end-of-text token after it, where the
    tokenizer has one.

    A piece that does not begin its text is tokenized once with the characters before it and once they alone: the tokens
    that come on top are its own. So no piece gets what a tokenizer puts before the first word of a text.
    """
    first, final = around(tokenizer)
    end = tokenizer.eos_token_id
    for group in in_groups(texts):
        parts = [piece for piece in group if not piece.is_whole]
        whole = iter(tokenize(tokenizer, [piece.text for piece in group if piece.is_whole], special=True))
        joined = iter(tokenize(tokenizer, [piece.before + piece.text for piece in parts]))
        before = iter(tokenize(tokenizer, [piece.before for piece in parts]))
        for piece in group:
            if piece.is_whole:
                own = next(whole)
            else:
                own = without(next(before), next(joined)) or tokenize(tokenizer, [piece.text])[0]
                own = [*(() if piece.before else first), *own, *(final if piece.last else ())]
            if piece.last and end is not None and (not own or own[-1] != end):
                own.append(end)
            yield Tokens(np.asarray(own, dtype=np.int32), piece.last)


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str], special: bool = False) -> list[list[int]]:
    """The ids of each text, with what the tokenizer puts around a text where ``special``."""
    if not texts:
        return []
    with ToldAs(ConfigError, "The tokenizer cannot be used"):
        told = tokenizer(texts, add_special_tokens=special, return_attention_mask=False, verbose=False)
        return [list(ids) for ids in told["input_ids"]]


def without(before: list[int], joined: list[int]) -> list[int] | None:
    """``joined`` without the tokens ``before`` at its beginning; None where others are there."""
    return joined[len(before) :] if joined[: len(before)] == before else None


def around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after the tokens of a text."""
    (plain,), (full,) = tokenize(tokenizer, ["a"]), tokenize(tokenizer, ["a"], special=True)
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
