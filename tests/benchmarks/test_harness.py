"""What the numbers of the benchmarks rest on: the counter, taking turns, contenders that fail, the page."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from harness import worker
from harness.contenders import HANDWRITTEN, Contender, ContenderError, Peer, nurseries
from harness.counting import Call, CollectiveCounter
from harness.dtensor_ops import DTensorOperations
from harness.layouts import NotOfferedError
from harness.saved_tensors import SavedTensors
from harness.statistics import in_turns, ratio
from report import render
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from shardwright.verify.ranks import RankPool


def _count() -> tuple[list[Call], dict[str, int]]:
    mesh = init_device_mesh("cpu", (2,))
    with CollectiveCounter() as counter:
        dist.all_reduce(torch.ones(8))
        sharded = distribute_tensor(torch.ones(4, 6), mesh, [Shard(0)], src_data_rank=None)
        sharded.redistribute(placements=[Replicate()])
    with DTensorOperations([]) as operations:
        sharded + sharded
        torch.ones(2) + 1
    return counter.calls, dict(operations.everywhere)


def test_collectives_and_dtensor_operations_are_counted(ranks2: RankPool) -> None:
    calls, operations = ranks2.run(_count)[0]
    assert calls == [Call("all-reduce", 2 * 32 / 2), Call("all-gather", 96 / 2)]
    assert operations == {"add": 1}


def test_saved_tensors_are_counted_once_and_without_parameters() -> None:
    model = nn.Linear(4, 4, bias=False)
    x = torch.ones(2, 4, requires_grad=True)
    with SavedTensors(model) as saved:
        (model(x) + model(x)).exp().sum()
    assert saved.bytes == 2 * (2 * 4 * 4)  # x and the result of exp
    assert saved.widest(8) == 8
    assert saved.widest(9) == 0


def test_turns_alternate() -> None:
    order: list[str] = []

    def runner(name: str) -> float:
        order.append(name)
        return float(len(order))

    seconds = in_turns({name: lambda name=name: runner(name) for name in "ab"}, 2)
    assert order == ["a", "b", "b", "a"]
    assert ratio(seconds["a"], seconds["b"]) == [1 / 2, 4 / 3]


def test_a_contender_that_fails_says_why_and_starts_anew() -> None:
    with Contender(Peer("none", "Nobody"), backend="none", timeout=60) as contender:
        with pytest.raises(ContenderError, match=r"Nobody: FileNotFoundError: .*no-such-file"):
            contender.call("os:stat", path="/no-such-file")
        assert contender.call("os.path:basename", p="/a/b") == ["b"]


def test_a_nursery_forks_ranks_that_join_fail_and_start_anew() -> None:
    with nurseries([HANDWRITTEN]) as forks, Contender(HANDWRITTEN, 2, nursery=forks[HANDWRITTEN]) as contender:
        first = contender.call("os:getpid")
        assert len(set(first)) == 2
        assert contender.call("os:getppid") == [forks[HANDWRITTEN].pid] * 2
        assert contender.call("torch.distributed:get_rank") == [0, 1]
        assert contender.call("os:getenv", key="RANK") == ["0", "1"]
        with pytest.raises(ContenderError, match=r"FileNotFoundError: .*no-such-file"):
            contender.call("os:stat", path="/no-such-file")
        assert not set(first) & set(contender.call("os:getpid"))


def test_a_peer_that_cannot_be_imported_says_why() -> None:
    peer = Peer("no_such_peer", "Nobody")
    raised = pytest.raises(ContenderError, match=r"ModuleNotFoundError: .*no_such_peer")
    with nurseries([peer]) as forks, Contender(peer, nursery=forks[peer]) as contender, raised:
        contender.call("os:getpid")


def test_what_a_peer_does_not_offer_does_not_end_its_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise NotOfferedError("there is no such thing")

    monkeypatch.setattr(sys.modules[__name__], "refuse", refuse, raising=False)
    assert worker.answer_to({"function": f"{__name__}:refuse", "arguments": {}}) == {
        "not offered": "there is no such thing"
    }


def test_a_peer_that_is_not_installed_is_named() -> None:
    peer = Peer("none", "Nobody", "no-such-environment")
    with Contender(peer) as contender, pytest.raises(ContenderError, match="Nobody is not installed"):
        contender.call("os:getpid")


def test_the_page_lists_what_did_not_run() -> None:
    goal = {"text": "less", "measured": "2 | 3", "reached": False}
    result = {
        "question": "How much?",
        "how": "Counted.",
        "seconds": 1.0,
        "tables": [{"title": "T", "columns": ["a"], "rows": [[1]]}],
        "goals": [goal],
        "failures": [{"who": "Nobody", "error": "an error"}],
        "notes": [],
        "versions": {},
        "machine": dict.fromkeys(("cpu", "cores", "memory_gb", "system", "python", "commit", "command", "date"), "x"),
    }
    page = render({"one": result, "two": {"error": "not done within 9 s"}}, "Title")
    assert "| one | less | 2 \\| 3 | **not reached** |" in page
    assert "- Nobody: an error" in page
    assert "Did not run: not done within 9 s" in page


def test_the_runner_has_every_script() -> None:
    from run import LIMITS

    folder = Path(sys.modules["run"].__file__ or "").parent
    assert all((folder / f"{name}.py").is_file() for name in LIMITS)
    assert sum(LIMITS.values()) <= 20 * 60
