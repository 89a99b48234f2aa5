"""From tokens to batches: the same global batch at every step, whatever the mesh.

A *row* is ``sequence_length + 1`` tokens: the model reads all but the last, and each position's target is the token
after it. Rows of packed text overlap by that one token, so every token is a target once.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

IGNORE = -100  # a target that is not counted, torch's convention
PADDING = -1
TOKENS = "tokens.bin"
TARGETS = "targets.bin"  # how many targets each row has, where not every token is one
FLAGS = "flags.bin"  # a byte for each token, where examples are kept apart: the two below
TRAINED, STARTS = 1, 2  # it is a target; an example, or the padding, begins with it
SHAPE = "tokens.json"


@dataclass(frozen=True)
class Shape:
    """How rows lie in the flat file of tokens.

    Attributes:
        documents: several examples share a row, and positions begin at 0 in each.
    """

    sequences: int
    sequence_length: int
    stride: int
    documents: bool = False


@dataclass(frozen=True)
class Tokens:
    """Some tokens of a text, the next after those before.

    Attributes:
        ids: one-dimensional, int32.
        last: the text ends with them.
    """

    ids: np.ndarray
    last: bool = True


def write_packed(parts: Iterable[Tokens], folder: Path, sequence_length: int) -> tuple[Shape, int]:
    """All texts one after the other in one file; the tokens after the last whole sequence are not used.

    Returns:
        The shape (its ``sequences`` may be 0) and the number of tokens written.
    """
    total = 0
    with (folder / TOKENS).open("wb") as file:
        for part in parts:
            part.ids.tofile(file)
            total += len(part.ids)
    return write_shape(folder, Shape(max(total - 1, 0) // sequence_length, sequence_length, sequence_length)), total


def write_separate(parts: Iterable[Tokens], folder: Path, sequence_length: int) -> tuple[Shape, int]:
    """Every text in rows of its own, the last one padded; returns what :func:`write_packed` does.

    How many targets each row has goes into a file of its own, so that nobody has to read the rows to count them.
    """
    total = rows = 0
    width = sequence_length + 1
    rest = np.empty(0, dtype=np.int32)  # of the text that is being written: its last token begins the next row
    with (folder / TOKENS).open("wb") as tokens, (folder / TARGETS).open("wb") as targets:
        for part in parts:
            total += len(part.ids)
            rest = np.concatenate([rest, part.ids])
            while len(rest) >= width or (part.last and len(rest) > 1):
                row = np.full(width, PADDING, dtype=np.int32)
                row[: len(rest[:width])] = rest[:width]
                row.tofile(tokens)
                np.int32(min(len(rest), width) - 1).tofile(targets)
                rest = rest[sequence_length:]
                rows += 1
            rest = rest[:0] if part.last else rest
    return write_shape(folder, Shape(rows, sequence_length, width)), total


def write_shape(folder: Path, shape: Shape) -> Shape:
    """Leave ``shape`` where :class:`TokenRows` finds it."""
    (folder / SHAPE).write_text(json.dumps(asdict(shape)))
    return shape


@dataclass(frozen=True)
class Batch:
    """Rows ready for the model.

    Attributes:
        input_ids: tokens, ``[rows, sequence_length]``, int64.
        labels: the token after each, or ``IGNORE``; same shape.
        position_ids: where several examples share a row, each position's place in its example; same shape.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor | None = None

    @property
    def inputs(self) -> dict[str, Any]:
        """The arguments of the model's call. Without a cache: transformers tells examples apart only then."""
        positions = {} if self.position_ids is None else {"position_ids": self.position_ids}
        return {"input_ids": self.input_ids, **positions, "use_cache": False}

    def to(self, device: torch.device) -> Batch:
        positions = None if self.position_ids is None else self.position_ids.to(device)
        return Batch(self.input_ids.to(device), self.labels.to(device), positions)


class TokenRows:
    """The rows that :func:`write_packed`, :func:`write_separate` or ``write_documents`` left in ``folder``, read from
    disk as needed."""

    def __init__(self, folder: Path) -> None:
        self.shape = Shape(**json.loads((folder / SHAPE).read_text()))
        self._tokens = np.memmap(folder / TOKENS, dtype=np.int32, mode="r")
        padded, flagged = (folder / TARGETS).is_file(), (folder / FLAGS).is_file()
        self._targets = np.memmap(folder / TARGETS, dtype=np.int32, mode="r") if padded else None
        self._flags = np.memmap(folder / FLAGS, dtype=np.uint8, mode="r") if flagged else None

    def __len__(self) -> int:
        return self.shape.sequences

    def batch(self, rows: np.ndarray) -> Batch:
        """The rows with these numbers; -1 stands for a row of nothing but padding."""
        offsets = np.maximum(rows, 0)[:, None] * self.shape.stride + np.arange(self.shape.sequence_length + 1)
        tokens = torch.from_numpy(np.asarray(self._tokens[offsets], dtype=np.int64))
        tokens[torch.from_numpy(rows < 0)] = PADDING
        labels = tokens[:, 1:].clone()
        labels[labels == PADDING] = IGNORE
        ids = tokens[:, :-1].clamp(min=0)
        if self._flags is None:
            return Batch(ids, labels)
        flags = self._flags[offsets]
        labels[torch.from_numpy((flags[:, 1:] & TRAINED) == 0)] = IGNORE
        return Batch(ids, labels, _positions(flags[:, :-1]) if self.shape.documents else None)

    def targets(self, rows: np.ndarray) -> int:
        """How many positions of these rows have a target: what the loss is divided by. Reads no row."""
        there = rows[rows >= 0]
        if self._targets is None:
            return len(there) * self.shape.sequence_length
        return int(self._targets[there].sum(dtype=np.int64))


def _positions(flags: np.ndarray) -> Tensor:
    """Each token's place in its example, int64, as ``flags``."""
    place = np.arange(flags.shape[1])
    starts = np.maximum.accumulate(np.where(flags & STARTS, place, 0), axis=1)
    return torch.from_numpy(place - starts)


class Order:
    """Which rows make up the global batch of every step: all of them, shuffled, then all of them shuffled anew.

    Held-out rows are drawn by the seed and never trained on.
    """

    def __init__(self, rows: int, batch_size: int, held_out: int, seed: int) -> None:
        drawn = np.random.default_rng([seed]).permutation(rows)
        self.held_out = np.sort(drawn[:held_out])
        self._rows = np.sort(drawn[held_out:])
        self._batch_size = batch_size
        self._seed = seed
        self._cached: tuple[int, np.ndarray] = (-1, self._rows)

    def _epoch(self, number: int) -> np.ndarray:
        if self._cached[0] != number:
            shuffled = np.random.default_rng([self._seed, number + 1]).permutation(self._rows)
            self._cached = (number, shuffled)
        return self._cached[1]

    def rows(self, step: int) -> np.ndarray:
        """The row numbers of the global batch of ``step`` (from 0), ``[batch_size]``."""
        position = step * self._batch_size
        taken: list[np.ndarray] = []
        while (missing := self._batch_size - sum(map(len, taken))) > 0:
            epoch, offset = divmod(position, len(self._rows))
            taken.append(self._epoch(epoch)[offset : offset + missing])
            position += len(taken[-1])
        return np.concatenate(taken)


def deal(rows: np.ndarray, dp_rank: int, dp_size: int, accumulation: int) -> np.ndarray:
    """One data-parallel rank's share of a global batch, ``[accumulation, batch_size / (accumulation * dp_size)]``."""
    return rows.reshape(accumulation, dp_size, -1)[:, dp_rank]
