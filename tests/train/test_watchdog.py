"""Every phase has a bound, and who exceeds it says where: with the others' help where they answer, without it else."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from shardwright.train.config import load_config
from shardwright.train.orphan import ORPHANED
from shardwright.train.watchdog import Limit, Watchdog, within

SHORT = Limit(0.4, "step_timeout")
LONG = Limit(1000.0, "phase_timeout")


class _Peers:
    """Three ranks, of which ``answers`` say where they are."""

    def __init__(self, answers: dict[int, str | None], rank: int = 0, blocked: bool = False) -> None:
        self.answers, self.rank, self.blocked = {rank: None, **answers}, rank, blocked
        self.question = False

    def asked(self) -> bool:
        return self.question

    def ask(self) -> None:
        self.question = True

    def tell(self, phase: str) -> None:
        if self.blocked:
            threading.Event().wait()
        self.answers[self.rank] = phase

    def told(self) -> dict[int, str | None]:
        if self.blocked:
            threading.Event().wait()
        return self.answers


def _ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, peers: _Peers | None, begin: str = "in step 3") -> str:
    """What the watchdog says when this thread stays in a phase."""
    monkeypatch.setattr("shardwright.train.watchdog.NOTICE", 0.2)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    codes: list[int] = []
    watchdog = Watchdog(SHORT, LONG, codes.append)
    watchdog.peers = peers
    watchdog.begin(begin, step=True)
    watchdog.start()
    end = time.monotonic() + 20
    while not codes and time.monotonic() < end:
        time.sleep(0.01)
    assert codes == [70]
    return json.loads((tmp_path / "error.json").read_text())["message"]["message"]


def test_a_phase_that_takes_too_long_is_told_where_the_launcher_looks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    told = _ended(monkeypatch, tmp_path, _Peers({1: "in step 3", 2: None}))
    assert told.startswith("RunError: Rank 0 has been in step 3 for more than 0.4 seconds (step_timeout), waiting in ")
    assert "test_watchdog.py" in told
    assert told.endswith(" Nothing was heard of rank(s) 2: look there first.")
    assert capfd.readouterr().err.count("Error: Rank 0 has been in step 3") == 1


def test_who_is_elsewhere_is_told_and_only_the_first_speaks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    told = _ended(monkeypatch, tmp_path, _Peers({0: "in step 3", 1: "evaluating after step 2"}, rank=2))
    assert told.endswith(" Of the others, rank 1 is evaluating after step 2.")
    assert capfd.readouterr().err == ""


def test_a_store_that_does_not_answer_holds_nobody_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It hung for ever where rank 0 had the store and was the one that was stopped."""
    told = _ended(monkeypatch, tmp_path, _Peers({}, rank=1, blocked=True))
    assert told.endswith(" The store through which the ranks meet does not answer either: look at rank 0 first.")
    assert _ended(monkeypatch, tmp_path, None, "joining the other ranks").endswith("look at those that did not start.")


def test_a_rank_answers_before_its_own_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    peers = _Peers({})
    peers.question = True
    watchdog = Watchdog(Limit(6.0, "step_timeout"), LONG, lambda code: None)
    watchdog.peers = peers
    watchdog.begin("in step 7", step=True)
    with watchdog.watching():
        time.sleep(1.5)
        assert peers.answers == {0: None}
        time.sleep(3)
        assert peers.answers == {0: "in step 7"}


def test_a_new_phase_has_its_own_time() -> None:
    codes: list[int] = []
    watchdog = Watchdog(SHORT, LONG, codes.append)
    with watchdog.watching():
        for step in range(8):
            watchdog.begin(f"in step {step}", step=True)
            time.sleep(0.2)
        watchdog.begin("saving the model")
        time.sleep(1)
    assert codes == []


_SLEEPER = """
import sys, time
from shardwright.train.watchdog import Limit, Watchdog
watchdog = Watchdog(Limit(2.0, "a"), Limit(2.0, "b"))
watchdog.start()
print("ready", flush=True)
time.sleep(1.2)
print("done", flush=True)
"""


def test_time_in_which_the_process_was_stopped_does_not_count() -> None:
    """Ctrl-Z and fg: the run goes on."""
    with subprocess.Popen([sys.executable, "-c", _SLEEPER], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(3)
        process.send_signal(signal.SIGCONT)
        assert process.stdout.readline() == "done\n"
    assert process.returncode == 0


def test_within_gives_up_and_tells_nothing_where_it_raises() -> None:
    def broken() -> int:
        raise RuntimeError("the store is gone")

    assert within(5, lambda: 3) == 3
    assert within(5, broken) is None
    begin = time.monotonic()
    assert within(0.1, threading.Event().wait) is None
    assert time.monotonic() - begin < 2


_ORPHAN = """
import os, subprocess, sys, time
from pathlib import Path
child = '''
import sys, time
from pathlib import Path
from shardwright.train.orphan import end_with_parent
end_with_parent(int(sys.argv[1]), Path(sys.argv[2]))
print("ready", flush=True)
time.sleep(100)
'''
print(subprocess.Popen([sys.executable, "-c", child, str(os.getpid()), sys.argv[1]]).pid, flush=True)
time.sleep(100)
"""


def test_a_rank_ends_with_its_launcher_and_removes_its_folder(tmp_path: Path) -> None:
    job = tmp_path / "job"
    job.mkdir()
    (job / "tokens").touch()
    with subprocess.Popen([sys.executable, "-c", _ORPHAN, job], stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        pid = int(launcher.stdout.readline())
        assert launcher.stdout.readline() == "ready\n"
        launcher.kill()
        end = time.monotonic() + 10
        while _alive(pid):
            assert time.monotonic() < end, "it goes on"
            time.sleep(0.05)
    assert not job.exists()


def test_a_launcher_that_is_gone_before_the_rank_looks(tmp_path: Path) -> None:
    """Its own parent is not asked for: by then that is another process."""
    code = "from shardwright.train.orphan import end_with_parent as e; import time; e(999999999); time.sleep(60)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=30).returncode == ORPHANED


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_what_a_rank_needs_before_it_watches_imports_no_torch() -> None:
    code = "import sys, shardwright.train.worker, shardwright.train.start; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_phases_have_a_bound_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: {path: x}\ndata: {paths: x}")
    for overrides, seconds in [([], 1800), (["step_timeout=5"], 60), (["step_timeout=5", "phase_timeout=7"], 7)]:
        assert load_config(tmp_path / "run.yaml", overrides).rank_settings.seconds_per_phase == seconds
