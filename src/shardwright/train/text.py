"""Reading the training text in pieces: memory does not grow with the length of a file."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from shardwright.errors import ConfigError
from shardwright.train.records import FILES, is_saved_dataset, read_records, told_of_file

PIECE = 2**16  # characters; a tokenizer takes some 230 bytes for each
_CONTEXT = 64  # characters before a piece that the tokenizer sees again


@dataclass(frozen=True)
class Piece:
    """A part of a text.

    Attributes:
        text: its characters.
        before: some of those before it; empty at the beginning of a text.
        last: the text ends with it.
    """

    text: str
    before: str = ""
    last: bool = True

    @property
    def is_whole(self) -> bool:
        """It is all of its text."""
        return self.last and not self.before


def read_texts(files: Sequence[Path], text_key: str) -> Iterator[Piece]:
    """The texts in ``files`` in pieces, without empty ones: one a line of a ``.jsonl`` file, one a row of a
    ``.parquet`` file or of a folder of ``datasets``, else one a file.

    Raises:
        ConfigError: a file that is not UTF-8, or a line or row without the text; the message has file and line.
    """
    for file in files:
        if file.suffix in FILES or is_saved_dataset(file):
            for record in read_records([file]):
                text = record.values.get(text_key) if isinstance(record.values, dict) else None
                if not isinstance(text, str):
                    raise ConfigError(f"{record.lacks(text_key, 'text')} Set data.text_key to the key of the text.")
                if text.strip():
                    yield from pieces(io.StringIO(text).read)
            continue
        with told_of_file(file), file.open(encoding="utf-8") as opened:
            yield from pieces(opened.read)


def pieces(read: Callable[[int], str]) -> Iterator[Piece]:
    """A text in pieces that a tokenizer can be given one by one; none where it is nothing but spaces.

    A piece ends after a word, before what separates it from the next, where there is such a place in its second half.

    Args:
        read: returns the next characters, at most as many as it is asked for; none at the end.
    """
    before, held = "", read(PIECE)
    while more := read(PIECE):
        end = _end(held)
        yield Piece(held[:end], before, last=False)
        before, held = (before + held[:end])[-_CONTEXT:], held[end:] + more
    if before or held.strip():
        yield Piece(held, before)


def _end(held: str) -> int:
    half = len(held) // 2
    places = (place for place in range(len(held) - 1, half, -1) if held[place].isspace() and held[place - 1].isalnum())
    return next(places, len(held))
