"""What a number was measured on: hardware, versions, commit, command."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
WATCHED = ("torch", "transformers", "nemo-automodel", "accelerate", "megatron-fsdp", "safetensors", "shardwright")


def describe(command: list[str] | None = None) -> dict[str, Any]:
    """The machine, the commit and the command of this run."""
    return {
        "cpu": _field("/proc/cpuinfo", "model name") or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(int((_field("/proc/meminfo", "MemTotal") or "0 kB").split()[0]) / 2**20, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "commit": commit(),
        "command": " ".join(command or [Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def commit() -> str:
    """The commit that is checked out, with ``+`` where the library's files differ from it."""
    if not (ROOT / ".git").exists():
        return "unknown"
    head = _git("rev-parse", "--short", "HEAD")
    return head + ("+" if _git("status", "--porcelain", "--", "src", "benchmarks/*.py") else "")


def versions() -> dict[str, str]:
    """The installed versions of what matters here, in this interpreter."""
    installed = {str(each.metadata["Name"]).lower(): each.version for each in distributions()}
    return {name: installed[name] for name in WATCHED if name in installed}


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def _field(path: str, name: str) -> str | None:
    """The value of the first ``name : value`` line of a file under /proc."""
    if not Path(path).is_file():
        return None
    for line in Path(path).read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return None
