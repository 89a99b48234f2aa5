"""Fixtures for every test: ranks that stay alive for a file of tests.

Idle ranks cost time: each of their process groups has a thread that wakes a hundred times a second.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections import Counter
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch

from shardwright.verify.ranks import PRELOADED, RankPool


def pytest_configure() -> None:
    """File names are compared: folders of tests are no packages, so Python would import one of two that are alike."""
    names = Counter(path.name for path in Path(__file__).parent.rglob("*.py") if path.name != "conftest.py")
    if twice := sorted(name for name, count in names.items() if count > 1):
        raise pytest.UsageError(f"Files of tests need names of their own; more than one is called {', '.join(twice)}.")
    # Tests send signals to commands, which leave ignored what they were started to ignore: a CI may run under nohup.
    for number, handler in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.fixture(scope="session")
def fork_server() -> None:
    """The server that ranks are forked from has peft and Trainer: importing them takes four seconds, in every rank."""
    multiprocessing.set_forkserver_preload([*PRELOADED, "peft", "transformers.trainer", "shardwright.train.rank"])
    forkserver.ensure_running()


@pytest.fixture(scope="module")
def ranks2(fork_server: None) -> Iterator[RankPool]:
    """Two gloo ranks; ``ranks2.run(function, *args)`` returns what each rank returned."""
    with RankPool(2, timeout=120) as pool:
        yield pool


@pytest.fixture(scope="module")
def ranks4(fork_server: None) -> Iterator[RankPool]:
    """Four gloo ranks."""
    with RankPool(4, timeout=120) as pool:
        yield pool


@pytest.fixture(scope="session")
def gpus() -> Iterator[RankPool]:
    """NCCL ranks, one on each GPU of this machine."""
    with RankPool(torch.cuda.device_count(), timeout=240, kind="cuda") as pool:
        yield pool


@pytest.fixture(scope="session")
def shared2() -> Iterator[RankPool]:
    """Two ranks that share the GPUs there are, one will do."""
    with RankPool(2, timeout=240, kind="shared_gpu") as pool:
        yield pool


@pytest.fixture(scope="session")
def shared4() -> Iterator[RankPool]:
    """Four ranks, likewise."""
    with RankPool(4, timeout=240, kind="shared_gpu") as pool:
        yield pool
