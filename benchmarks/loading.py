"""How long does a checkpoint of a few GB take to load onto two ranks, how much memory does a rank need, what is read?

The folder is written once, into the page cache of the machine, and lies there for all contenders alike. Every load is
done by fresh processes. Bytes are counted where they are read by calls (``rchar`` in ``/proc/self/io``) and where files
are mapped into memory (``RssFile``); memory is that of anonymous pages, which mapped files do not add to, and of all.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

from harness.contenders import ACCELERATE, OURS, TRANSFORMERS, Contender, Peer
from harness.layouts import Layout
from harness.machine import versions
from harness.results import Results, Table, arguments
from harness.shapes import write_checkpoint
from harness.statistics import in_turns, ratio, ratio_text, spread

# A Llama of 1.2 billion parameters: 2.4 GB in bfloat16.
SIZES = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 22,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
}
QUICK = {**SIZES, "num_hidden_layers": 2}
LAYOUTS = {Layout(tp=2): (OURS, TRANSFORMERS), Layout(dp=2): (OURS, TRANSFORMERS, ACCELERATE)}
GOAL_TIME = 0.7
PER_RANK = ("anonymous", "resident", "read", "mapped", "shard")  # bytes


def load(peer: str, folder: str, layout: dict[str, Any]) -> dict[str, Any]:
    """On a rank: load, and say what it took. Imports are not counted."""
    library = import_module(f"harness.peers.{peer}")
    began, read = time.perf_counter(), read_calls()
    resident = memory("VmRSS")
    with peaks("RssAnon", "RssFile") as peak:
        model = library.load(folder, Layout(**layout))
    seconds = time.perf_counter() - began
    parameters = [part.to_local() if hasattr(part, "to_local") else part for part in model.parameters()]
    return {
        "seconds": seconds,
        "read": read_calls() - read,
        "mapped": peak["RssFile"],
        "anonymous": peak["RssAnon"],
        "resident": memory("VmHWM") - resident,
        "shard": sum(part.numel() * part.element_size() for part in parameters),
        "dtype": str(parameters[0].dtype),
        "versions": versions(),
    }


def read_calls() -> int:
    """Bytes that this process has read by system calls."""
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


def memory(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) * 1024


@contextmanager
def peaks(*names: str, interval: float = 0.005) -> Iterator[dict[str, int]]:
    """How much these lines of /proc/self/status grew at their highest, sampled in a thread; filled in at the end."""
    before, peak, done = {name: memory(name) for name in names}, dict.fromkeys(names, 0), threading.Event()

    def look() -> None:
        for name in names:
            peak[name] = max(peak[name], memory(name) - before[name])

    def watch() -> None:
        while not done.wait(interval):
            look()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()
        look()


def measure(peer: Peer, layout: Layout, folder: Path, found: dict[Peer, list[Any]]) -> float:
    with Contender(peer, layout.tp * layout.dp) as contender:
        asked = {"peer": peer.name, "folder": str(folder), "layout": vars(layout)}
        answers = contender.call("loading:load", **asked)
    found.setdefault(peer, []).append(answers)
    return max(answer["seconds"] for answer in answers)


def run(layout: Layout, peers: tuple[Peer, ...], folder: Path, rounds: int, results: Results) -> None:
    able = []
    for peer in peers:  # a first time, which also brings the files into the page cache for all that follow
        with results.failures_of(f"{peer.title}, {layout.title}"):
            measure(peer, layout, folder, {})
            able.append(peer)
    found: dict[Peer, list[Any]] = {}
    seconds = in_turns({peer: partial(measure, peer, layout, folder, found) for peer in able}, rounds)
    size = gigabytes(sum(file.stat().st_size for file in folder.glob("*.safetensors")))
    columns = ["contender", "median s", "spread", "ours / theirs", *(f"{what} GB" for what in PER_RANK), "dtype"]
    table = Table(f"{layout.title}: a checkpoint of {size} GB; sizes per rank, the largest", columns)
    most: dict[Peer, dict[str, float]] = {}
    for peer, values in seconds.items():
        each = [answer for answers in found[peer] for answer in answers]
        results.versions[peer.title] = each[0]["versions"]
        most[peer] = {what: max(answer[what] for answer in each) for what in PER_RANK}
        against = ratio_text(seconds[OURS], values) if OURS in seconds else ""
        sizes = [gigabytes(most[peer][what]) for what in PER_RANK]
        table.rows.append([peer.title, f"{median(values):.2f}", spread(values), against, *sizes, each[0]["dtype"]])
    results.tables.append(table)
    if OURS in able and len(able) > 1:
        judge(layout, seconds, most, results)


def judge(layout: Layout, seconds: dict[Peer, list[float]], most: dict[Peer, Any], results: Results) -> None:
    """Time against the best peer; memory and bytes against every one."""
    peers = [peer for peer in seconds if peer != OURS]
    best = min(peers, key=lambda peer: median(seconds[peer]))
    value = median(ratio(seconds[OURS], seconds[best]))
    results.goal(f"{layout.title}: time <= {GOAL_TIME} of the best ({best.title})", f"{value:.2f}", value <= GOAL_TIME)
    for title, mine, theirs in (
        ("less memory (anonymous) than every peer", most[OURS]["anonymous"], [most[p]["anonymous"] for p in peers]),
        ("fewer bytes read or mapped than every peer", touched(most[OURS]), [touched(most[peer]) for peer in peers]),
    ):
        measured = f"{gigabytes(mine)} GB; theirs {', '.join(map(gigabytes, theirs))} GB"
        results.goal(f"{layout.title}: {title}", measured, mine < min(theirs))


def touched(most: dict[str, float]) -> float:
    return most["read"] + most["mapped"]


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f}"


def main() -> None:
    options = arguments(__doc__).parse_args()
    results = Results(
        "loading",
        "Loading a checkpoint of a few GB on two ranks",
        "Fresh processes for every load, files in the page cache, contenders in turns; imports are not counted. "
        "`read`: bytes of read calls. `mapped`: growth of mapped file pages at its highest, sampled. `anonymous`: "
        "growth of the rank's own memory at its highest, sampled; `resident`: of all its pages.",
    )
    with tempfile.TemporaryDirectory(prefix="bench-loading-") as scratch:
        folder = write_checkpoint(Path(scratch) / "llama", "llama", "bfloat16", **(QUICK if options.quick else SIZES))
        for layout, peers in LAYOUTS.items():
            run(layout, peers, folder, 1 if options.quick else 3, results)
    results.write()


if __name__ == "__main__":
    main()
