"""How long from the start of a process to the end of its first training step, and which model files were imported?

Two gloo ranks, each a fresh interpreter, a tiny Qwen3. Wall seconds from the start of the processes to the end of the
first step, contenders in turns.
"""

from __future__ import annotations

import sys
import tempfile
import time
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

from harness.contenders import AUTOMODEL, HANDWRITTEN, OURS, TRANSFORMERS, Contender, Peer
from harness.layouts import Layout
from harness.machine import versions
from harness.results import Results, Table, arguments
from harness.shapes import batch_of, write_checkpoint
from harness.statistics import in_turns, ratio, ratio_text, spread

FAMILY, LAYOUT = "qwen3", Layout(tp=2)
CONTENDERS = (OURS, HANDWRITTEN, TRANSFORMERS, AUTOMODEL)
# What a user of transformers loads anyway: the family that is used and the machinery of the Auto classes.
ALLOWED = (FAMILY, "auto")


def first_step(peer: str, folder: str, layout: dict[str, Any]) -> dict[str, Any]:
    """On a rank: one step; the modeling files of transformers that this process has imported, and all its modules."""
    sharded = import_module(f"harness.peers.{peer}").build(folder, Layout(**layout))
    sharded.backward(batch_of(1, 16, 256, seed=0))
    prefix = "transformers.models."
    models = [
        name.removeprefix(prefix) for name in list(sys.modules) if name.startswith(prefix) and ".modeling_" in name
    ]
    return {"models": sorted(models), "modules": len(sys.modules), "versions": versions()}


def measure(peer: Peer, folder: Path, found: dict[Peer, Any]) -> float:
    began = time.monotonic()
    with Contender(peer, 2) as contender:
        asked = {"peer": peer.name, "folder": str(folder), "layout": vars(LAYOUT)}
        found[peer] = contender.call("first_step:first_step", **asked)[0]
        return time.monotonic() - began


def main() -> None:
    options = arguments(__doc__).parse_args()
    results = Results(
        "first_step",
        "First step latency from process start",
        "Two fresh gloo ranks, tiny Qwen3, TP 2: wall seconds from starting the interpreters to the end of the first "
        "training step, contenders in turns. Model files: `transformers.models.*.modeling_*` in `sys.modules`.",
    )
    table = Table("Seconds", ["contender", "median", "spread", "ours / theirs", "modules", "model files imported"])
    found: dict[Peer, Any] = {}
    with tempfile.TemporaryDirectory(prefix="bench-first-") as scratch:
        folder = write_checkpoint(Path(scratch) / FAMILY, FAMILY, num_hidden_layers=2)
        for peer in CONTENDERS:  # fills the caches of the file system; and those who cannot run are found out
            with results.failures_of(peer.title):
                measure(peer, folder, found)
        runners = {peer: partial(measure, peer, folder, found) for peer in CONTENDERS if peer in found}
        seconds = in_turns(runners, 1 if options.quick else 3)
    for peer, values in seconds.items():
        results.versions[peer.title] = found[peer]["versions"]
        files, against = found[peer]["models"], ratio_text(seconds[OURS], values)
        named = f"{len(files)}: {', '.join(files[:6])}" + ", ..." * (len(files) > 6)
        row = [peer.title, f"{median(values):.2f}", spread(values), against, found[peer]["modules"], named]
        table.rows.append(row)
    results.tables.append(table)
    if OURS in found:
        strange = [name for name in found[OURS]["models"] if name.split(".")[0] not in ALLOWED]
        results.goal("no import of model files that are not used", ", ".join(strange) or "none", not strange)
        if HANDWRITTEN in seconds:
            value = median(ratio(seconds[OURS], seconds[HANDWRITTEN]))
            results.goal("first step within 1.25 of hand-written torch", f"{value:.2f}", value <= 1.25)
    results.write()


if __name__ == "__main__":
    main()
