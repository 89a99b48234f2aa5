"""Examples as token ids, each with which of them are trained on, and the rows that they are written to.

An example stays whole: it is in one row, and what else is in that row does not see it. Where each begins is kept, so
that positions can begin at 0 there: by that transformers' attention tells them apart.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from shardwright.errors import ConfigError
from shardwright.train.dataset import FLAGS, PADDING, STARTS, TARGETS, TOKENS, TRAINED, Shape, write_shape
from shardwright.train.sections import DataSettings

_OPEN = 64  # rows that are filled at the same time


@dataclass(frozen=True)
class Document:
    """One example.

    Attributes:
        ids: ``[tokens]``, int32.
        trained: which of them are trained on, ``[tokens]``, bool.
        where: its file and line, for errors.
    """

    ids: np.ndarray
    trained: np.ndarray
    where: str = ""


@dataclass
class Counts:
    """What became of the examples."""

    documents: int = 0
    tokens: int = 0
    trained: int = 0
    truncated: int = 0
    dropped: int = 0
    untrained: int = 0

    def told(self, data: DataSettings) -> str:
        """A sentence on those that are not used as they are; empty where there are none."""
        parts = {
            f"{self.truncated:,} are cut to {data.sequence_length + 1} tokens (data.too_long)": self.truncated,
            f"{self.dropped:,} are longer and left out (data.too_long)": self.dropped,
            f"{self.untrained:,} have no token to train on and are left out": self.untrained,
        }
        return "; ".join(text for text, count in parts.items() if count)


def write_documents(documents: Iterable[Document], folder: Path, data: DataSettings) -> tuple[Shape, Counts]:
    """Write rows of ``sequence_length + 1`` tokens; with ``data.pack`` several examples to a row, else one.

    Raises:
        ConfigError: an example is too long, and ``data.too_long`` says to raise.
    """
    width, counts, rows = data.sequence_length + 1, Counts(), 0
    with (
        (folder / TOKENS).open("wb") as tokens,
        (folder / FLAGS).open("wb") as flags,
        (folder / TARGETS).open("wb") as targets,
    ):
        for row in _packed(_fitting(documents, data, counts), width, _OPEN if data.pack else 0):
            _write_row(row, width, tokens, flags, targets)
            rows += 1
    return write_shape(folder, Shape(rows, data.sequence_length, width, documents=data.pack)), counts


def _fitting(documents: Iterable[Document], data: DataSettings, counts: Counts) -> Iterable[Document]:
    """Those that are used, at most as long as a row; the first token of one is no target, since nothing precedes it."""
    width = data.sequence_length + 1
    for document in documents:
        ids, trained = document.ids, document.trained.copy()
        if len(ids) > width and data.too_long == "raise":
            raise ConfigError(
                f"{document.where} has {len(ids):,} tokens, more than data.sequence_length = {data.sequence_length} "
                "can take (one more than that). Raise it, or set data.too_long to truncate or drop."
            )
        if len(ids) > width and data.too_long == "drop":
            counts.dropped += 1
            continue
        counts.truncated += len(ids) > width
        ids, trained = ids[:width], trained[:width]
        trained[:1] = False
        if not trained.any():
            counts.untrained += 1
            continue
        counts.documents += 1
        counts.tokens += len(ids)
        counts.trained += int(trained.sum())
        yield Document(ids, trained)


def _packed(documents: Iterable[Document], width: int, open_rows: int) -> Iterable[list[Document]]:
    """Rows: each example goes into the fullest of the open rows that has room for it (best fit)."""
    rows: list[list[Document]] = []
    room: list[int] = []
    for document in documents:
        fitting = [place for place, free in enumerate(room) if free >= len(document.ids)]
        if fitting:
            place = min(fitting, key=lambda place: room[place])
            rows[place].append(document)
            room[place] -= len(document.ids)
        else:
            rows.append([document])
            room.append(width - len(document.ids))
        if len(rows) > open_rows:
            place = room.index(min(room))
            room.pop(place)
            yield rows.pop(place)
    yield from rows


def _write_row(row: list[Document], width: int, tokens: BinaryIO, flags: BinaryIO, targets: BinaryIO) -> None:
    ids, flag = np.full(width, PADDING, dtype=np.int32), np.zeros(width, dtype=np.uint8)
    at = 0
    for document in row:
        end = at + len(document.ids)
        ids[at:end] = document.ids
        flag[at:end] = document.trained * np.uint8(TRAINED)
        flag[at] |= STARTS
        at = end
    flag[at : at + 1] |= STARTS  # the padding is by itself, too
    ids.tofile(tokens)
    flag.tofile(flags)
    np.int32(((flag & TRAINED) > 0).sum()).tofile(targets)
