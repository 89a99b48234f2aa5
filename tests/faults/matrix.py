"""Faults x phases x victims: real runs that are disturbed, resumed, and compared with an unbroken one.

    python tests/faults/matrix.py                  # all cells; an hour or two
    python tests/faults/matrix.py --write          # and the table into docs/checkpoints.md
    python tests/faults/matrix.py step SIGKILL     # cells that have all of these

One run is disturbed again and again, each time resumed from its last checkpoint; every line of its metrics must be that
of the unbroken run, whatever came before.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs" / "checkpoints.md"
BEGIN, END = "<!-- matrix -->", "<!-- end of matrix -->"

FAULTS = ("SIGKILL", "SIGTERM", "SIGINT", "SIGSTOP", "full disk")
PHASES = ("import", "model build", "first step", "step", "evaluation", "checkpoint", "resume", "final save", "export")
VICTIMS = ("a rank", "rank 0", "launcher", "both", "a node's ranks")
ALONE = "the process"  # an export has one

CONFIG = """
model:
  config: {{model_type: llama, hidden_size: 64, intermediate_size: 128, num_hidden_layers: 1, num_attention_heads: 2,
           attention_dropout: 0.1}}
tokenizer: {{vocab_size: 300}}
data: {{paths: "stdlib:json", include: "*.py", sequence_length: 24, validation: 4}}
output: {{dir: run, tensorboard: false, validate_every: 2}}
optimizer: {{lr: 1.e-3}}
schedule: {{steps: 100000}}
checkpoint: {{every: 3, resume: true}}
steps: {steps}
step_timeout: {step_timeout}
phase_timeout: {phase_timeout}
device: cpu
"""
TRAIN = ["-m", "shardwright.cli", "train", "run.yaml"]
STEPS = 6  # that a run has left when it is disturbed


@dataclass(frozen=True)
class Cell:
    """One fault, at one point, for one victim."""

    fault: str
    phase: str
    victim: str

    def __str__(self) -> str:
        return f"{self.fault} / {self.phase} / {self.victim}"


@dataclass(frozen=True)
class Outcome:
    """What became of a disturbed run.

    Attributes:
        seconds: from the fault to the end of the last process.
        exit_code: of what was started; of the first node, where there are several.
        error: the one error that was told; empty where the run went on.
        problems: what should not have been.
    """

    seconds: float
    exit_code: int
    error: str
    problems: tuple[str, ...]

    @property
    def went_on(self) -> bool:
        return self.exit_code == 0


def all_cells() -> list[Cell]:
    trained = [Cell(fault, phase, victim) for phase in PHASES[:-1] for fault in FAULTS for victim in VICTIMS]
    return trained + [Cell(fault, "export", ALONE) for fault in FAULTS]


@dataclass(frozen=True)
class Times:
    """Limits in seconds; ``extra`` is for what they do not count, as torch's wait for processes that are stopped."""

    step: float = 20.0
    phase: float = 90.0
    extra: float = 180.0

    @property
    def bound(self) -> float:
        return self.phase + self.extra


class Chain:
    """One run in a folder of its own, disturbed once per cell.

    Args:
        losses: of the unbroken run, by step.
    """

    def __init__(self, folder: Path, losses: dict[int, float], times: Times) -> None:
        self._folder, self._losses, self._times = folder, losses, times
        self._temporary = folder / "tmp"
        self._temporary.mkdir(parents=True)
        self._leave_config()

    def check(self, cell: Cell) -> Outcome:
        """Disturb the run once, and see what it leaves."""
        for file in self._folder.glob("struck-*"):
            file.unlink()
        if cell.phase in ("resume", "export") and not self._checkpoints():
            self._start(None, 1)[0].communicate(timeout=self._times.bound)
        started = self._start(cell, 2 if cell.victim == "a node's ranks" else 1)
        begin = time.monotonic()
        try:
            struck = self._wait_until_struck(started)
            said = self._end_of(started, cell)
            seconds = time.monotonic() - (struck or begin)
            problems = [*self._problems(cell, said), *([] if struck else ["the fault never came"])]
        except subprocess.TimeoutExpired:
            seconds, said = time.monotonic() - begin, [("", "")] * len(started)
            problems = [f"nothing ended within {self._times.bound:g} seconds"]
            _kill(_processes_of(self._folder))
        return Outcome(
            seconds, started[0].returncode or 0, _errors("".join(error for _, error in said)), tuple(problems)
        )

    def finish(self) -> list[str]:
        """Let the run end undisturbed; returns what is wrong with what it leaves."""
        (process,) = self._start(None, 1)
        _, error = process.communicate(timeout=self._times.bound)
        problems = [] if process.returncode == 0 else [f"the last run failed: {error}"]
        # torch's compiler makes a folder for its cache, which is not a run's.
        left = [name for name in os.listdir(self._temporary) if not name.startswith("torchinductor_")]
        left += [str(path) for path in (self._folder / "run").rglob(".*") if path.name != ".metadata"]
        problems += [f"left behind: {name}" for name in left]
        return [*problems, *self._wrong_lines()]

    def _start(self, cell: Cell | None, nodes: int) -> list[subprocess.Popen[str]]:
        done = max(self._checkpoints(), default=0)
        environment = {
            **os.environ,
            "TMPDIR": str(self._temporary),
            "PYTHONPATH": os.pathsep.join([str(HERE / "hook"), *sys.path]),
            "SHARDWRIGHT_FAULT": json.dumps(None if cell is None else {**asdict(cell), "folder": str(self._folder)}),
            "SHARDWRIGHT_CHAIN": str(self._folder),
        }
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        if cell is not None and cell.phase == "export":
            commands = [[sys.executable, "-m", "shardwright.cli", "export", "run", f"out-{cell.fault}"]]
        elif nodes == 1:
            commands = [[sys.executable, *TRAIN, f"steps={done + STEPS}", "sharding.dp_shard=2"]]
        else:
            torchrun = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                f"--nnodes={nodes}",
                "--nproc-per-node=1",
                f"--log-dir={self._folder / 'torchrun'}",
            ]  # else it leaves a folder in the temporary one
            meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{_free_port()}", "--max-restarts=0"]
            training = [*TRAIN, f"steps={done + STEPS}", f"sharding.dp_shard={nodes}"]
            commands = [[*torchrun, *meeting, f"--node-rank={node}", *training] for node in range(nodes)]
        return [subprocess.Popen(command, cwd=self._folder, env=environment, **pipes) for command in commands]

    def _wait_until_struck(self, started: Sequence[subprocess.Popen[str]]) -> float | None:
        """When the fault came; None where all processes ended before it did."""
        end = time.monotonic() + self._times.bound
        while not list(self._folder.glob("struck-*")):
            if all(process.poll() is not None for process in started):
                return None
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("the fault", self._times.bound)
            time.sleep(0.05)
        return time.monotonic()

    def _end_of(self, started: Sequence[subprocess.Popen[str]], cell: Cell) -> list[tuple[str, str]]:
        """What every process has said; a launcher that was stopped goes on when it alone is left."""
        if cell.fault == "SIGSTOP" and cell.victim in ("launcher", "both", ALONE):
            self._continue_when_alone(started[0].pid, cell)
        with ThreadPoolExecutor(len(started)) as together:
            return list(together.map(lambda process: process.communicate(timeout=self._times.bound), started))

    def _continue_when_alone(self, pid: int, cell: Cell) -> None:
        end = time.monotonic() + self._times.bound
        while cell.victim != ALONE and time.monotonic() < end and _running(_processes_of(self._folder) - {pid}):
            time.sleep(0.2)
        os.kill(pid, signal.SIGCONT)

    def _problems(self, cell: Cell, said: Iterable[tuple[str, str]]) -> Iterator[str]:
        error = "".join(error for _, error in said)
        end = time.monotonic() + 5  # ranks look twice a second whether their launcher is still there
        while (left := _processes_of(self._folder)) and time.monotonic() < end:
            time.sleep(0.1)
        if left:
            yield f"processes left: {sorted(left)}"
            _kill(left)
        if "Traceback" in error and cell.victim != "a node's ranks":  # torchrun shows one of its own
            yield f"a traceback: {error[-2000:]}"
        if error.count("Error: ") > 1 and cell.victim != "a node's ranks":
            yield f"several errors: {error[-2000:]}"
        yield from self._wrong_lines()
        if cell.phase == "export":
            yield from self._wrong_export(cell)

    def _wrong_export(self, cell: Cell) -> Iterator[str]:
        out = self._folder / f"out-{cell.fault}"
        whole = (out / "manifest.json").is_file()
        if out.exists() and not whole:
            yield f"{out.name} is there in part"
        if not whole:
            command = [sys.executable, "-m", "shardwright.cli", "export", "run", out.name]
            again = subprocess.run(command, cwd=self._folder, capture_output=True, text=True, check=False)
            if again.returncode or not (out / "manifest.json").is_file():
                yield f"a second export failed: {again.stderr}"
        yield from (f"left behind: {path.name}" for path in self._folder.glob(f".{out.name}*"))

    def _wrong_lines(self) -> Iterator[str]:
        for step, loss in read_losses(self._folder).items():
            if loss != self._losses[step]:
                yield f"step {step} has loss {loss} and not {self._losses[step]}"
                return

    def _checkpoints(self) -> list[int]:
        names = self._folder.glob("run/checkpoints/step-*/manifest.json")
        return sorted(int(path.parent.name.removeprefix("step-")) for path in names)

    def _leave_config(self) -> None:
        text = CONFIG.format(steps=STEPS, step_timeout=self._times.step, phase_timeout=self._times.phase)
        (self._folder / "run.yaml").write_text(text)


def unbroken(folder: Path, steps: int, times: Times) -> dict[int, float]:
    """The losses of a run of so many steps that nothing disturbs."""
    folder.mkdir(parents=True)
    text = CONFIG.format(steps=steps, step_timeout=times.step, phase_timeout=times.phase)
    (folder / "run.yaml").write_text(text)
    command = [sys.executable, *TRAIN, "sharding.dp_shard=2", "checkpoint.every=0"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return read_losses(folder)


def read_losses(folder: Path) -> dict[int, float]:
    file = folder / "run" / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    told = [json.loads(line) for line in lines if line.endswith("}")]
    return {line["step"]: line["loss"] for line in told}


def _errors(text: str) -> str:
    """What follows the first ``Error: ``, in one line."""
    return " ".join(text.partition("Error: ")[2].split())[:300]


def _processes_of(folder: Path) -> set[int]:
    """The processes of the chain in ``folder`` that are left, by their environment."""
    mark = f"SHARDWRIGHT_CHAIN={folder}".encode()
    found = set()
    for environment in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark in environment.read_bytes().split(b"\0"):
                found.add(int(environment.parent.name))
        except OSError:
            continue
    return found


def _running(pids: Iterable[int]) -> bool:
    """Whether one of them is neither stopped nor dead."""
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state not in "TtZX":
            return True
    return False


def _kill(pids: Iterable[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _free_port() -> int:
    import socket

    with socket.socket() as opened:
        opened.bind(("localhost", 0))
        return int(opened.getsockname()[1])


def run(cells: Sequence[Cell], folder: Path, times: Times, chains: int = 2) -> tuple[dict[Cell, Outcome], list[str]]:
    """The outcomes of ``cells``, in so many chains side by side, and what is wrong at their ends."""
    losses = unbroken(folder / "unbroken", STEPS * (len(cells) + 2), times)
    waiting = [cell for cell in cells if cell.fault == "SIGSTOP"]
    others = [cell for cell in cells if cell.fault != "SIGSTOP"]
    shares = [share for share in (waiting, *(others[n::chains] for n in range(chains))) if share]

    def one(number: int) -> tuple[dict[Cell, Outcome], list[str]]:
        chain = Chain(folder / f"chain-{number}", losses, times)
        found = {}
        for cell in shares[number]:
            found[cell] = outcome = chain.check(cell)
            state = "; ".join(outcome.problems) or "as it should"
            print(
                f"{cell}: exit code {outcome.exit_code} after {outcome.seconds:.0f} s, {outcome.error!r}: {state}",
                flush=True,
            )
        return found, chain.finish()

    with ThreadPoolExecutor(len(shares)) as together:
        results = list(together.map(one, range(len(shares))))
    return {cell: outcome for found, _ in results for cell, outcome in found.items()}, [
        p for _, ps in results for p in ps
    ]


def table(outcomes: dict[Cell, Outcome]) -> str:
    """Markdown: for every fault, phases by victims. Phases that were not run are left out."""
    lines = []
    for fault in FAULTS:
        rows = []
        for phase in PHASES:
            row = [outcomes.get(Cell(fault, phase, victim)) for victim in VICTIMS]
            if phase == "export":
                row[0] = outcomes.get(Cell(fault, phase, ALONE))
            if any(row):
                rows.append(f"| {phase} | {' | '.join(map(_shown, row))} |")
        if rows:
            lines += [f"**{fault}**", "", f"| phase | {' | '.join(VICTIMS)} |", f"| --- |{' --- |' * len(VICTIMS)}"]
            lines += [*rows, ""]
    return "\n".join(lines)


def _shown(outcome: Outcome | None) -> str:
    if outcome is None:
        return ""
    if outcome.problems:
        return f"**{outcome.problems[0]}**"
    if outcome.went_on:
        return "goes on"
    what = "saves, ends" if outcome.exit_code == 75 else "ends"
    return f"{what}, {outcome.seconds:.0f} s"


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("words", nargs="*")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--chains", type=int, default=2)
    parser.add_argument("--results", type=Path, help="read and extend the outcomes in this JSON file")
    options = parser.parse_args()
    cells = [cell for cell in all_cells() if set(options.words) <= {cell.fault, cell.phase, cell.victim}]
    known = _read(options.results)
    with tempfile.TemporaryDirectory(prefix="matrix-") as folder:
        outcomes, problems = run([cell for cell in cells if cell not in known], Path(folder), Times(), options.chains)
    outcomes = known | outcomes
    if options.results:
        stored = [{**asdict(cell), **asdict(outcome)} for cell, outcome in outcomes.items()]
        options.results.write_text(json.dumps(stored, indent=1))
    bad = [f"{cell}: {'; '.join(outcome.problems)}" for cell, outcome in outcomes.items() if outcome.problems]
    if options.write:
        text = DOCS.read_text()
        before, _, rest = text.partition(BEGIN)
        DOCS.write_text(f"{before}{BEGIN}\n\n{table(outcomes)}\n{END}{rest.partition(END)[2]}")
    print(f"{len(outcomes)} cells, {len(bad)} not as they should be", *bad, *problems, sep="\n")
    return 1 if bad or problems else 0


def _read(results: Path | None) -> dict[Cell, Outcome]:
    known = {}
    for line in json.loads(results.read_text()) if results and results.exists() else []:
        cell = Cell(line.pop("fault"), line.pop("phase"), line.pop("victim"))
        if not line["problems"]:
            known[cell] = Outcome(**{**line, "problems": ()})
    return known


if __name__ == "__main__":
    raise SystemExit(main())
