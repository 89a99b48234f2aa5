"""Examples with columns: lines of JSONL files, rows of parquet files and of folders that ``datasets`` has written.

None is held in memory as a whole. JSONL is read here, since a line that is wrong has to be named; ``datasets`` reads
the rest.
"""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from shardwright.errors import ConfigError
from shardwright.untrusted import ToldAs, parse_json

JSONL, PARQUET = ".jsonl", ".parquet"
FILES = (JSONL, PARQUET)
_LINE = 2**24  # characters of a line of JSON, which is parsed in one piece
_BYTES = 2**16  # read at once
_DATASET = "state.json"  # what ``save_to_disk`` leaves in the folder of a dataset,
_SPLITS = "dataset_dict.json"  # and in one with several of them, a folder for each


@dataclass(frozen=True)
class Record:
    """One example.

    Attributes:
        where: its file and line, or row, followed by a comma: the beginning of an error.
        values: column -> value; what else a line of JSON may hold, where it is no mapping.
    """

    where: str
    values: Any

    def lacks(self, key: str, wanted: str) -> str:
        """A sentence that says what is there in the place of ``wanted``, such as a text, under ``key``."""
        if not isinstance(self.values, dict):
            kind = type(self.values).__name__
            return f"{self.where} is a {kind} and not a mapping with the {wanted} under the key {key!r}."
        if key in self.values:
            value = self.values[key]
            kind = {dict: "a mapping", list: "a list", type(None): "null", str: "a text"}.get(type(value), "a number")
            hint = " (for a conversation, set data.format to chat)" if kind == "a list" and wanted == "text" else ""
            return f"{self.where} has {kind} under the key {key!r}, and not a {wanted}{hint}."
        keys = [name if len(name) < 40 else f"{name[:40]}..." for name in self.values]
        listed = ", ".join(map(repr, keys[:8])) + (", ..." if len(keys) > 8 else "")
        return f"{self.where} has no {wanted} under the key {key!r} (it has {listed or 'no keys'})."


def is_saved_dataset(path: Path) -> bool:
    """Whether ``datasets`` has written this folder."""
    return (path / _DATASET).is_file() or (path / _SPLITS).is_file()


def read_records(files: Sequence[Path]) -> Iterator[Record]:
    """The examples in ``files``, in their order.

    Raises:
        ConfigError: a file of another kind, one that cannot be read, or a line that is not JSON; the message has file
            and line.
    """
    for file in files:
        if file.suffix == JSONL:
            yield from _read_jsonl(file)
        elif file.suffix == PARQUET or is_saved_dataset(file):
            yield from _read_rows(file)
        else:
            raise ConfigError(
                f"{file} has no examples with columns: those are read from {' and '.join(FILES)} files and from "
                "folders that datasets has written. Set data.include or data.paths to them, or data.format to text."
            )


def _read_rows(path: Path) -> Iterator[Record]:
    if find_spec("datasets") is None:
        raise ConfigError(f"Reading {path} takes the package datasets: pip install 'shardwright[trainers]'.")
    import datasets

    rows: Any
    with ToldAs(ConfigError, f"datasets cannot read {path}"):
        if path.is_file():
            rows = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        else:
            rows = datasets.load_from_disk(str(path))
    if isinstance(rows, datasets.DatasetDict):
        folders = " or ".join(str(path / name) for name in rows)
        raise ConfigError(f"{path} holds several datasets. Name one of them: {folders}.")
    number, found = 0, iter(rows)
    while True:
        with ToldAs(ConfigError, f"datasets cannot read {path} after row {number}"):
            row = next(found, None)
        if row is None:
            return
        number += 1
        yield Record(f"{path}, row {number},", row)


def _read_jsonl(file: Path) -> Iterator[Record]:
    with told_of_file(file), file.open(encoding="utf-8") as opened:
        yield from _lines(opened, file)


def _lines(lines: io.TextIOBase, file: Path) -> Iterator[Record]:
    number = 0
    while line := lines.readline(_LINE + 1):
        number += 1
        where = f"{file}, line {number},"
        if len(line) > _LINE:
            raise ConfigError(
                f"{where} has more than {_LINE:,} characters. Split the text, or store it as a .txt file."
            )
        if line.strip():
            yield Record(where, parse_json(line, where, ConfigError))


@contextmanager
def told_of_file(file: Path) -> Iterator[None]:
    """Inside, ``file`` is read as UTF-8; that it is not, or cannot be read, becomes a ConfigError."""
    try:
        yield
    except UnicodeDecodeError:
        raise ConfigError(
            f"{file} is not UTF-8 text (byte {_first_bad_byte(file)}). Convert it, or leave it out with data.exclude."
        ) from None
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}.") from None


def _first_bad_byte(file: Path) -> int:
    decoder, done = codecs.getincrementaldecoder("utf-8")(), 0
    with file.open("rb") as opened:
        while data := opened.read(_BYTES):
            held = len(decoder.getstate()[0])
            try:
                decoder.decode(data)
            except UnicodeDecodeError as error:
                return done - held + error.start
            done += len(data)
    return done - len(decoder.getstate()[0])  # it ends in the middle of a character
