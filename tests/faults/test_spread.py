"""A spread of the matrix, and some hundred damaged files; all of both by ``make matrix`` and ``make fuzz``."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import fuzz
import matrix
import pytest
from matrix import ALONE, Cell, Outcome, Times

pytestmark = [pytest.mark.fault, pytest.mark.timeout(1800)]

SPREAD = (
    Cell("SIGKILL", "import", "launcher"),
    Cell("SIGTERM", "model build", "rank 0"),
    Cell("SIGKILL", "checkpoint", "both"),
    Cell("full disk", "checkpoint", "a rank"),
    Cell("SIGINT", "evaluation", "launcher"),
    Cell("SIGTERM", "step", "launcher"),
    Cell("SIGKILL", "resume", "a rank"),
    Cell("full disk", "final save", "rank 0"),
    Cell("SIGKILL", "first step", "a node's ranks"),
    Cell("SIGSTOP", "step", "rank 0"),
    Cell("SIGTERM", "export", ALONE),
)


def test_a_spread_of_faults(tmp_path: Path) -> None:
    outcomes, problems = matrix.run(SPREAD, tmp_path, Times(step=15), chains=1)
    assert problems == []
    assert {str(cell): outcome.problems for cell, outcome in outcomes.items() if outcome.problems} == {}
    stopped = outcomes[Cell("SIGSTOP", "step", "rank 0")]
    assert "Rank 1 has been in step" in stopped.error
    assert "Nothing was heard of rank(s) 0" in stopped.error
    assert outcomes[Cell("SIGTERM", "step", "launcher")].exit_code == 75
    assert "Rank 1" in outcomes[Cell("SIGKILL", "resume", "a rank")].error


def test_the_table_shows_every_outcome() -> None:
    outcomes = {
        Cell("SIGKILL", "step", "a rank"): Outcome(2.4, 1, "Rank 1 died", ()),
        Cell("SIGSTOP", "step", "launcher"): Outcome(9.0, 0, "", ()),
        Cell("SIGTERM", "export", ALONE): Outcome(1.0, 1, "Stopped", ("processes left: [7]",)),
    }
    text = matrix.table(outcomes)
    assert "| step | ends, 2 s |" in text
    assert "| step |  |  | goes on |" in text
    assert "| export | **processes left: [7]** |" in text


def test_damaged_files() -> None:
    outcomes, bad = fuzz.run(500, seed=0, seconds=600)
    assert bad == []
    assert sum(outcomes.values()) == 500
    assert outcomes["error"] > 200
    assert outcomes["same"] > 20


def test_a_reader_that_runs_what_it_reads_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The fuzzer itself: it sees code that runs, tracebacks, memory, and other values under a manifest."""

    def runs(folder: Path) -> object:
        os.system("true")
        return 1

    def damaged(folder: Path) -> bool:
        return (folder / "plan.yaml").read_bytes() != (tmp_path / "plan.yaml").read_bytes()

    def raises(folder: Path) -> object:
        if damaged(folder):
            raise KeyError("x")
        return 1

    def takes(folder: Path) -> object:
        return len(b"x" * (700 * 2**20 if damaged(folder) else 1))

    def believes(folder: Path) -> object:
        return (folder / "plan.yaml").read_bytes()

    def unpickles(folder: Path) -> object:
        return pickle.loads(pickle.dumps(Path("x")))

    fuzz.make(tmp_path / "whole")
    (tmp_path / "plan.yaml").write_bytes((tmp_path / "whole" / "others" / "plan.yaml").read_bytes())
    for read, told in [
        (runs, "it did os.system"),
        (raises, "KeyError"),
        (takes, " MB, then"),
        (believes, "other values under a manifest"),
        (unpickles, "it did pickle.find_class"),
    ]:
        target = fuzz.Target("planted", "others", "plan.yaml", read, sealed=read is believes)
        monkeypatch.setattr(fuzz, "targets", lambda root, target=target: [target])
        monkeypatch.setattr(fuzz, "_seal", lambda file: None)
        _, bad = fuzz.run(6, seed=0)
        assert any(told in one for one in bad), (told, bad)
