"""What a benchmark found, as JSON that ``report.py`` renders: tables, goals, and who could not run."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from harness.contenders import BUILD, ContenderError
from harness.machine import describe

RESULTS = BUILD / "results"


@dataclass
class Table:
    title: str
    columns: list[str]
    rows: list[list[Any]] = field(default_factory=list)


@dataclass
class Goal:
    """A row of the list of goals.

    Attributes:
        text: what is to be reached.
        measured: what was.
        reached: None where it could not be measured.
    """

    text: str
    measured: str
    reached: bool | None


@dataclass
class Results:
    """Everything one benchmark found.

    Attributes:
        name: of the script.
        question: what it answers.
        how: how it was measured, in a sentence or two.
        versions: of the packages, by contender.
        failures: what a contender could not run, and the error that it gave.
    """

    name: str
    question: str
    how: str
    tables: list[Table] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)
    versions: dict[str, dict[str, str]] = field(default_factory=dict)
    failures: list[dict[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=describe)
    seconds: float = 0.0

    @contextmanager
    def failures_of(self, who: str) -> Iterator[None]:
        """A contender that fails in the block is listed; the benchmark goes on."""
        try:
            yield
        except ContenderError as error:
            self.failures.append({"who": who, "error": str(error)})

    def goal(self, text: str, measured: str, reached: bool | None) -> None:
        self.goals.append(Goal(text, measured, reached))

    def save(self, folder: Path = RESULTS) -> None:
        """Write what there is so far, for the case that the time limit comes before the end."""
        folder.mkdir(parents=True, exist_ok=True)
        self.seconds = round(time.monotonic() - _STARTED, 1)
        (folder / f"{self.name}.json").write_text(json.dumps(asdict(self), indent=1) + "\n")

    def write(self) -> None:
        """Write everything, and print it."""
        self.save()
        for table in self.tables:
            print(f"\n{table.title}\n" + "\n".join("  ".join(map(str, row)) for row in [table.columns, *table.rows]))
        for goal in self.goals:
            print(f"{'?' if goal.reached is None else 'yes' if goal.reached else 'NO'}: {goal.text}: {goal.measured}")
        for failure in self.failures:
            print(f"could not run: {failure['who']}: {failure['error']}")


_STARTED = time.monotonic()


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Options that every script has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="Few repetitions: to see that it runs, not to measure.")
    return parser
