"""Reading the training text in pieces: memory does not grow with the length of a file."""

from __future__ import annotations

import codecs
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from shardwright.errors import ConfigError
from shardwright.untrusted import parse_json

PIECE = 2**16  # characters; a tokenizer takes some 230 bytes for each
_CONTEXT = 64  # characters before a piece that the tokenizer sees again
_LINE = 2**24  # characters of a line of JSON, which is parsed in one piece


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
    """The texts in ``files`` in pieces, without empty ones: one a line of a ``.jsonl`` file, else one a file.

    Raises:
        ConfigError: a file that is not UTF-8, or a JSONL line without the text; the message has file and line.
    """
    for file in files:
        try:
            with file.open(encoding="utf-8") as opened:
                if file.suffix == ".jsonl":
                    for text in _read_jsonl(opened, file, text_key):
                        yield from pieces(io.StringIO(text).read)
                else:
                    yield from pieces(opened.read)
        except UnicodeDecodeError:
            raise ConfigError(
                f"{file} is not UTF-8 text (byte {_first_bad_byte(file)}). Convert it, or leave it out with "
                "data.exclude."
            ) from None
        except OSError as error:
            raise ConfigError(f"{file} cannot be read: {error.strerror}.") from None


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


def _first_bad_byte(file: Path) -> int:
    decoder, done = codecs.getincrementaldecoder("utf-8")(), 0
    with file.open("rb") as opened:
        while data := opened.read(PIECE):
            held = len(decoder.getstate()[0])
            try:
                decoder.decode(data)
            except UnicodeDecodeError as error:
                return done - held + error.start
            done += len(data)
    return done - len(decoder.getstate()[0])  # it ends in the middle of a character


def _read_jsonl(lines: io.TextIOBase, file: Path, text_key: str) -> Iterator[str]:
    number = 0
    while line := lines.readline(_LINE + 1):
        number += 1
        where = f"{file}, line {number},"
        if len(line) > _LINE:
            raise ConfigError(
                f"{where} has more than {_LINE:,} characters. Split the text, or store it as a .txt file."
            )
        if not line.strip():
            continue
        record = parse_json(line, where, ConfigError)
        text = record.get(text_key) if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise ConfigError(f"{where} {_what_is_there(record, text_key)}. Set data.text_key to the key of the text.")
        if text.strip():
            yield text


def _what_is_there(record: object, text_key: str) -> str:
    if not isinstance(record, dict):
        return f"is a {type(record).__name__} and not a mapping with the text under the key {text_key!r}"
    if text_key in record:
        kind = {dict: "a mapping", list: "a list", type(None): "null"}.get(type(record[text_key]), "a number")
        hint = " (a conversation has to be made one text first)" if isinstance(record[text_key], list) else ""
        return f"has {kind} under the key {text_key!r}, and not a text{hint}"
    keys = [key if len(key) < 40 else f"{key[:40]}..." for key in record]
    listed = ", ".join(map(repr, keys[:8])) + (", ..." if len(keys) > 8 else "")
    return f"has no text under the key {text_key!r} (it has {listed or 'no keys'})"
