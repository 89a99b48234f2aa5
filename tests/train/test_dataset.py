"""Rows, their order, and how a global batch is dealt out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardwright.train.dataset import IGNORE, Order, TokenRows, Tokens, deal, write_packed, write_separate


def _tokens(ids: list[int], last: bool = True) -> Tokens:
    return Tokens(np.array(ids, dtype=np.int32), last)


TEXTS = [_tokens([1, 2, 3, 0]), _tokens([4, 0]), _tokens([5, 6, 7, 8, 9, 0])]


def test_packed_rows_have_every_token_as_a_target_once(tmp_path: Path) -> None:
    shape, total = write_packed(TEXTS, tmp_path, sequence_length=3)
    assert (shape.sequences, total) == (3, 12)
    batch = TokenRows(tmp_path).batch(np.arange(3))
    assert batch.input_ids.tolist() == [[1, 2, 3], [0, 4, 0], [5, 6, 7]]
    assert batch.labels.tolist() == [[2, 3, 0], [4, 0, 5], [6, 7, 8]]
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64


def test_separate_rows_are_padded_and_the_padding_is_no_target(tmp_path: Path) -> None:
    shape, total = write_separate(TEXTS, tmp_path, sequence_length=4)
    assert (shape.sequences, total) == (4, 12)
    rows = TokenRows(tmp_path)
    batch = rows.batch(np.arange(4))
    assert batch.input_ids.tolist() == [[1, 2, 3, 0], [4, 0, 0, 0], [5, 6, 7, 8], [9, 0, 0, 0]]
    assert batch.labels.tolist() == [
        [2, 3, 0, IGNORE],
        [0, IGNORE, IGNORE, IGNORE],
        [6, 7, 8, 9],
        [0, IGNORE, IGNORE, IGNORE],
    ]
    assert rows.targets(np.arange(4)) == 12 - len(TEXTS)  # the first token of a text has nothing before it


def test_a_row_of_padding_counts_nothing(tmp_path: Path) -> None:
    write_packed(TEXTS, tmp_path, sequence_length=3)
    rows = TokenRows(tmp_path)
    assert rows.batch(np.array([0, -1])).labels.tolist() == [[2, 3, 0], [IGNORE] * 3]
    assert rows.targets(np.array([0, -1])) == 3


@pytest.mark.parametrize("texts", [[], [[1]], [[1, 2, 3]]])
def test_too_little_text_makes_no_row(tmp_path: Path, texts: list[list[int]]) -> None:
    assert write_packed(map(_tokens, texts), tmp_path, sequence_length=3)[0].sequences == 0


@given(
    rows=st.integers(2, 40), batch_size=st.integers(1, 50), held_out=st.integers(0, 10), seed=st.integers(0, 2**31 - 1)
)
def test_every_epoch_has_every_row_once_and_never_one_held_out(
    rows: int, batch_size: int, held_out: int, seed: int
) -> None:
    held_out = min(held_out, rows - 1)
    order = Order(rows, batch_size, held_out, seed)
    trained = rows - held_out
    stream = np.concatenate([order.rows(step) for step in range(-(-3 * trained // batch_size))])
    assert len(set(order.held_out)) == held_out
    for epoch in range(3):
        seen = stream[epoch * trained : (epoch + 1) * trained]
        assert sorted([*seen, *order.held_out]) == list(range(rows))
    again = Order(rows, batch_size, held_out, seed)
    assert (again.rows(1) == order.rows(1)).all()  # any step can be asked for first


def test_the_order_depends_on_seed_and_epoch() -> None:
    first = Order(50, 50, 0, seed=1)
    assert (first.rows(0) != first.rows(1)).any()
    assert (first.rows(0) != Order(50, 50, 0, seed=2).rows(0)).any()


@given(dp_size=st.integers(1, 4), accumulation=st.integers(1, 3), each=st.integers(1, 3))
def test_the_shares_are_the_global_batch(dp_size: int, accumulation: int, each: int) -> None:
    rows = np.arange(dp_size * accumulation * each)
    shares = [deal(rows, rank, dp_size, accumulation) for rank in range(dp_size)]
    assert all(share.shape == (accumulation, each) for share in shares)
    assert sorted(np.concatenate(shares, axis=None)) == list(rows)
    # A micro-batch holds the same rows however many ranks share it.
    for micro in range(accumulation):
        together = np.concatenate([share[micro] for share in shares])
        assert list(together) == list(deal(rows, 0, 1, accumulation)[micro])
