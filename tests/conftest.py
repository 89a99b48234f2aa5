"""Fixtures for every test: gloo ranks that stay alive for the whole session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from shardwright.verify.ranks import RankPool


@pytest.fixture(scope="session")
def ranks2() -> Iterator[RankPool]:
    """Two gloo ranks; ``ranks2.run(function, *args)`` returns what each rank returned."""
    with RankPool(2, timeout=60) as pool:
        yield pool


@pytest.fixture(scope="session")
def ranks4() -> Iterator[RankPool]:
    """Four gloo ranks."""
    with RankPool(4, timeout=60) as pool:
        yield pool
