"""Runs the benchmarks that need no GPU, one after the other, and writes ``RESULTS.md``: what ``make bench`` calls.

Every benchmark has a time limit; one that fails is listed in the results, and the others run.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from harness.contenders import BENCHMARKS
from harness.results import RESULTS, arguments
from report import render

# Seconds. They add up to 20 minutes.
LIMITS = {
    "collectives": 60,
    "step_time": 540,
    "host_overhead": 120,
    "planning": 90,
    "loading": 180,
    "activation_memory": 60,
    "first_step": 150,
}


def run(name: str, limit: float, options: list[str]) -> str:
    """Run one benchmark in a process group of its own; what went wrong in a line, or nothing."""
    (RESULTS / f"{name}.json").unlink(missing_ok=True)
    command = [sys.executable, f"{name}.py", *options]
    process = subprocess.Popen(command, cwd=BENCHMARKS, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        _, said = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return f"not done within {limit:g} s"
    return "" if process.returncode == 0 else (said.strip().splitlines() or ["no message"])[-1]


def note_error(path: Path, error: str) -> None:
    """Keep what a benchmark had saved before it ended, and say how it ended."""
    if path.is_file():
        found = json.loads(path.read_text())
        found["failures"].append({"who": "the rest of this benchmark", "error": error})
    else:
        found = {"error": error}
    path.write_text(json.dumps(found) + "\n")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("names", nargs="*", help="Only these; all of them without it.")
    parser.add_argument("--patience", type=float, default=1.0, help="Multiplies the time limits, for a busy machine.")
    options = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name in options.names or LIMITS:
        began = time.monotonic()
        print(f"== {name}", flush=True)
        error = run(name, LIMITS[name] * options.patience, ["--quick"] if options.quick else [])
        if error:
            note_error(RESULTS / f"{name}.json", error)
        print(f"== {name}: {error or 'done'}, {time.monotonic() - began:.0f} s", flush=True)
    paths = {name: RESULTS / f"{name}.json" for name in LIMITS}
    found = {name: json.loads(path.read_text()) for name, path in paths.items() if path.is_file()}
    (BENCHMARKS / "RESULTS.md").write_text(render(found, "Results of the benchmarks"))


if __name__ == "__main__":
    main()
