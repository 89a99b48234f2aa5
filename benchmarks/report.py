"""Writes ``RESULTS.md`` from the JSON of the benchmarks: python report.py [--output FILE] NAME..."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from harness.contenders import BENCHMARKS
from harness.results import RESULTS

REACHED = {True: "reached", False: "**not reached**", None: "not measured"}


def render(found: Mapping[str, dict[str, Any]], title: str) -> str:
    """The page: goals first, then a section per benchmark."""
    parts = [f"# {title}", "", "Written by a script from measured results; not edited by hand.", ""]
    parts += [*_machine(found.values()), "", "## What was to be reached", ""]
    rows = []
    for name, result in found.items():
        if "error" in result:
            rows.append([name, "", "did not run", REACHED[None]])
        rows += [[name, goal["text"], goal["measured"], REACHED[goal["reached"]]] for goal in result.get("goals", ())]
    parts += [*_table(["benchmark", "goal", "measured", ""], rows), ""]
    for name, result in found.items():
        parts += _failed(name, result) if "error" in result else _section(result)
    return "\n".join(parts).rstrip() + "\n"


def _machine(results: Iterable[dict[str, Any]]) -> list[str]:
    machines = [result["machine"] for result in results if "machine" in result]
    if not machines:
        return []
    first = machines[0]
    commits = sorted({machine["commit"] for machine in machines})
    dates = sorted(machine["date"] for machine in machines)
    rows = [
        ["hardware", f"{first['cpu']}, {first['cores']} cores, {first['memory_gb']} GB"],
        ["system", f"{first['system']}, Python {first['python']}"],
        ["commit", f"{', '.join(commits)} (+: with changes)"],
        ["measured", f"{dates[0]} to {dates[-1]}"],
    ]
    versions: dict[str, dict[str, str]] = {}
    for result in results:
        versions |= result.get("versions", {})
    rows += [[who, ", ".join(f"{name} {number}" for name, number in mine.items())] for who, mine in versions.items()]
    return _table(["", ""], rows)


def _section(result: dict[str, Any]) -> list[str]:
    parts = [f"## {result['question']}", "", result["how"], ""]
    parts += [f"`{result['machine']['command']}`, {result['seconds']:g} s", ""]
    for table in result["tables"]:
        parts += [f"### {table['title']}", "", *_table(table["columns"], table["rows"]), ""]
    if result["failures"]:
        parts += ["Could not run:", ""]
        parts += [f"- {failure['who']}: {_plain(failure['error'])}" for failure in result["failures"]] + [""]
    for note in result["notes"]:
        parts += [note, ""]
    return parts


def _failed(name: str, result: dict[str, Any]) -> list[str]:
    return [f"## {name}", "", f"Did not run: {_plain(result['error'])}", ""]


def _table(columns: list[str], rows: list[list[Any]]) -> list[str]:
    lines = [columns, ["---"] * len(columns), *rows]
    return ["| " + " | ".join(_plain(str(cell)) for cell in line) + " |" for line in lines]


def _plain(text: str) -> str:
    """Safe in a cell and in a list, and without folders of the machine it ran on."""
    return text.replace("|", "\\|").replace("\n", " ").replace(str(BENCHMARKS.parent), ".")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="+")
    parser.add_argument("--output", type=Path, default=BENCHMARKS / "RESULTS.md")
    parser.add_argument("--title", default="Results of the benchmarks")
    options = parser.parse_args()
    found = {}
    for name in options.names:
        path = RESULTS / f"{name}.json"
        found[name] = json.loads(path.read_text()) if path.is_file() else {"error": "there is no result of it"}
    options.output.write_text(render(found, options.title))


if __name__ == "__main__":
    main()
