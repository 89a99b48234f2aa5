"""``shardwright launch-check``: what it prints of ranks that are well, and that it finds what is wrong with others."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from shardwright.cli import main
from shardwright.launch_check.facts import Measured, RankFacts
from shardwright.launch_check.findings import findings
from shardwright.launch_check.report import axis_lines
from shardwright.launch_check.start import _settings, read, write
from shardwright.train.meeting import StorePeers, _store
from shardwright.train.place import place_from_environment
from shardwright.train.watchdog import HANGS, Limit, Watchdog

CHECK = [sys.executable, "-m", "shardwright.cli", "launch-check"]
# A rank 1 of another version, host and clock, whose products sleep.
OTHER = """
import socket, sys, time, torch, shardwright
now, product = time.time, torch.Tensor.__matmul__
shardwright.__version__ = "9.9"
socket.gethostname = lambda: "elsewhere"
time.time = lambda: now() + 30
torch.Tensor.__matmul__ = lambda x, y: (time.sleep(0.5), product(x, y))[1]
from shardwright.cli import main
main(sys.argv[1:])
"""


def rank(number: int, **others: Any) -> RankFacts:
    """One of four ranks on two hosts that are well: dp_shard 2 x tp 2."""
    pair = number // 2 * 2
    facts = RankFacts(
        rank=number,
        host=f"node-{number // 2}",
        device="H100 (79 GiB)",
        kind="cuda",
        versions={"torch": "2.13.0", "nccl": "2.27.5"},
        coordinates={"dp_shard": number // 2, "tp": number % 2},
        groups={"dp_shard": (number % 2, number % 2 + 2), "tp": (pair, pair + 1)},
        settings={"NCCL_SOCKET_IFNAME": f"eth{number // 2}", "NCCL_NET_GDR_LEVEL": "PHB"},
        came=1000.0 + number,
        ahead=0.01 * number,
        work=0.010 + 0.001 * number,
        measured={"dp_shard": Measured(4e-5, 2e-2, 2**28), "tp": Measured(2e-5, 1e-3, 2**28)},
    )
    return replace(facts, **others)


def test_ranks_that_are_well() -> None:
    ranks = [rank(number) for number in range(4)]
    assert findings(ranks) == []
    assert [line.split() for line in axis_lines(ranks)] == [
        ["axis", "ranks", "groups", "links", "latency", "all-reduce", "of"],
        ["dp_shard", "2", "2", "between", "2", "hosts", "0.040", "ms", "13.4", "GB/s", "256", "MiB"],
        ["tp", "2", "2", "within", "a", "host", "0.020", "ms", "268", "GB/s", "256", "MiB"],
    ]
    assert max(map(len, axis_lines(ranks))) < 80


ALL = range(4)


@pytest.mark.parametrize(
    ("wrong", "others", "message"),
    [
        ([3], {"versions": {"torch": "2.12", "nccl": "2.27.5"}}, "same torch: 2.13.0 on ranks 0, 1, 2; 2.12 on rank 3"),
        ([3], {"device": "A100 (79 GiB)"}, "same device: H100 on ranks 0, 1, 2; A100 on rank 3"),
        ([2], {"host": "node-0"}, "Hosts have different numbers of ranks: node-0 has 3, node-1 has 1"),
        ([1, 2], {"groups": {"tp": (1, 2)}}, "with rank 0 on node-0 and rank 3 on node-1. Each block"),
        ([2], {"work": 0.025}, "rank 2 compute slowly: a product of matrices takes rank 2 on node-1 25.0 ms, and 11"),
        ([3], {"ahead": 2.0}, "Clocks differ by 2.0 s: that of rank 3 on node-1 is ahead of rank 0's on node-0"),
        ([1], {"came": 1090.0}, "Rank 1 on node-0 came 90 s after the first"),
        ([1], {"settings": {"NCCL_P2P_DISABLE": "1"}}, "NCCL_P2P_DISABLE=1 on rank 1: it keeps"),
        (ALL, {"settings": {"NCCL_IB_DISABLE": "1"}}, "NCCL_IB_DISABLE=1 on every rank"),
        (ALL, {"settings": {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}}, "CUDA_DEVICE_MAX_CONNECTIONS=1 on every rank"),
        ([0], {"settings": {"NCCL_BUFFSIZE": "8388608"}}, "NCCL_BUFFSIZE differs: 8388608 on rank 0; not set"),
        (
            [2, 3],
            {"measured": {"dp_shard": Measured(4e-5, 2e-2, 2**28), "tp": Measured(2e-5, 1e-2, 2**28)}},
            "A tp group has a slow link: ranks 2, 3 on node-1 take 10.0 ms for an all-reduce, the median group 1.0 ms",
        ),
    ],
)  # fmt: skip
def test_what_looks_wrong(wrong: list[int], others: dict[str, Any], message: str) -> None:
    ranks = [rank(number, **(others if number in wrong else {})) for number in range(4)]
    if "tp" in others.get("groups", ()):
        ranks = [replace(one, groups={"tp": (1, 2) if one.rank in wrong else (0, 3)}) for one in ranks]
    found = findings(ranks)
    assert any(message in one for one in found), found


def test_settings_that_harm_between_hosts_only() -> None:
    alone = [rank(number, host="node", settings={"NCCL_IB_DISABLE": "1"}) for number in range(4)]
    assert findings(alone) == []
    on_cpu = [rank(number, kind="cpu", settings={"NCCL_P2P_DISABLE": "1"}) for number in range(4)]
    assert findings(on_cpu) == []


@pytest.mark.parametrize("size", [2, 4])
def test_what_to_do_about_tensor_parallelism_across_hosts(size: int) -> None:
    pairs = {2: [(0, 2), (1, 3)], 4: [(0, 1, 2, 3)]}[size]
    ranks = [rank(number, groups={"tp": next(pair for pair in pairs if number in pair)}) for number in range(4)]
    advice = {2: "Number the ranks host by host", 4: "Lower tp: a host has 2 ranks"}[size]
    assert any(advice in one for one in findings(ranks))


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


def numbered(printed: str) -> list[str]:
    return re.findall(r"^\d+\. (.*)", printed, re.MULTILINE)


def test_ranks_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """On a busy machine one of them may be slow, which is then all that it finds."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["launch-check", "sharding.tp=2", "device=cpu"])
    printed = capfd.readouterr().out
    lines = printed.splitlines()
    for number in (0, 1):
        told = next(line for line in lines if line.startswith(f"rank {number} "))
        assert re.search(
            rf"cpu \(\d+ cores\)  tp {number}  python 3\S*, torch 2\S*, transformers 5\S*, shardwright ", told
        )
    assert re.search(r"^tp +2 +1 +within a host +\S+ ms +\S+ GB/s +\d+ MiB$", printed, re.MULTILINE)
    slow = numbered(printed)
    assert all("compute slowly" in one for one in slow), slow
    assert (ended.value.code, lines[-1]) == (0, "Nothing looks wrong.") or slow
    assert list(tmp_path.iterdir()) == []


def test_ranks_that_a_launcher_has_started(tmp_path: Path) -> None:
    """Of which one is not as the other. Both end with the same error, told once."""
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    commands = [[*CHECK], [sys.executable, "-c", OTHER, "launch-check"]]
    started = [
        subprocess.Popen(
            [*command, "sharding.tp=2", "device=cpu"],
            cwd=tmp_path,
            env={**os.environ, **shared, "RANK": str(number)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number, command in enumerate(commands)
    ]
    (printed, error), (other, silent) = [process.communicate(timeout=250) for process in started]
    assert [process.returncode for process in started] == [1, 1], error + silent
    found = numbered(printed)
    for message in (
        "Not all ranks have the same shardwright: ",
        "tp crosses hosts: in 1 of its groups, the first with rank 0 on ",
        "rank 1 compute slowly: a product of matrices takes rank 1 on elsewhere",
        "Clocks differ by 30.",
    ):
        assert any(one.startswith(message) for one in found), printed
    assert re.search(r"^tp +2 +1 +between 2 hosts ", printed, re.MULTILINE)
    assert error.strip() == f"Error: {len(found)} things look wrong, as listed above."
    assert (other, silent) == ("", "")


def test_ranks_that_do_not_come_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Rank 0 serves the store before all are there, so the watchdog can ask in it."""
    meeting = {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    for name, value in meeting.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    place = place_from_environment(meeting)
    assert place is not None
    store: Any = _store(place, limit=timedelta(seconds=20))
    StorePeers(store.clone(), 2, 3).tell("joining the other ranks")
    ended: list[int] = []
    limit = Limit(0.2, "--timeout")
    watchdog = Watchdog(limit, limit, ended.append)
    watchdog.peers = StorePeers(store.clone(), 0, 3)
    watchdog.begin("joining the other ranks")
    with watchdog.watching():
        deadline = time.monotonic() + 60
        while not ended and time.monotonic() < deadline:
            time.sleep(0.05)
    assert ended == [HANGS]
    assert "Nothing was heard of rank(s) 1: look there first." in (tmp_path / "error.json").read_text()


def test_degrees_that_do_not_fit_are_told_before_there_are_ranks() -> None:
    told = CliRunner().invoke(main, ["launch-check", "sharding.tp=2", "ranks=3"])
    assert (told.exit_code, "does not divide the world size 3" in told.output) == (1, True)
    told = CliRunner().invoke(main, ["launch-check", "sharding.tpp=2"])
    assert "Unknown key 'sharding.tpp'. Did you mean 'tp'?" in told.output


def test_a_training_file_says_the_same_as_keys(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        "model: {config: {model_type: llama}}\ntokenizer: {vocab_size: 300}\ndata: {paths: x}\n"
        "sharding: {tp: 2, precision: bf16}\ndevice: cpu\n"
    )
    by_file = _settings([str(tmp_path / "run.yaml"), "sharding.tp=4"])
    assert by_file == _settings(["sharding.tp=4", "sharding.precision=bf16", "device=cpu"])
    write(by_file, tmp_path)
    assert read(tmp_path) == by_file
