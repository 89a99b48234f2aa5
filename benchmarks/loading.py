"""How long does a checkpoint of a few GB take to load onto two ranks, how much memory does a rank need, what is read?

The folder is written once, into the page cache of the machine, and lies there for all contenders alike. Every load is
done by fresh processes. Bytes are counted where they are read by calls (``rchar`` in ``/proc/self/io``) and where files
are mapped into memory (``RssFile``); memory is that of anonymous pages, which mapped files do not add to, and of all.
"""

from __future__ import annotations

import gc
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

import torch.distributed as dist
from harness.contenders import ACCELERATE, OURS, TRANSFORMERS, Contender, Peer
from harness.layouts import Layout
from harness.machine import versions
from harness.results import Results, Table, arguments
from harness.shapes import write_checkpoint
from harness.statistics import in_turns, ratio, ratio_text, spread
from torch.distributed.tensor import DTensor

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
# Layout, dtype of the loaded weights, contenders. In the dtype of the files, mapped files can be used as they are.
CASES = (
    (Layout(tp=2), "bfloat16", (OURS, TRANSFORMERS)),
    (Layout(tp=2), "float32", (OURS, TRANSFORMERS)),
    (Layout(dp=2), "float32", (OURS, TRANSFORMERS, ACCELERATE)),
)
Case = tuple[Layout, str, tuple[Peer, ...]]
GOAL_TIME = 0.7
PER_RANK = ("anonymous", "resident", "read", "mapped", "shard")  # bytes


def load(peer: str, folder: str, small: str, layout: dict[str, Any], dtype: str) -> dict[str, Any]:
    """On a rank: load, and say what it took, until every weight has been looked at once.

    A library that maps files into memory has read nothing until then. A small model is loaded first, so that nothing is
    imported in between.
    """
    library = import_module(f"harness.peers.{peer}")
    look_at(library.load(small, Layout(**layout), dtype))
    gc.collect()
    dist.barrier()
    began, read = time.perf_counter(), read_calls()
    with watched("RssAnon", "RssFile", "VmRSS") as sizes:
        model = library.load(folder, Layout(**layout), dtype)
        returned = time.perf_counter() - began
        shard = look_at(model)
    return {
        "seconds": time.perf_counter() - began,
        "returned": returned,
        "read": read_calls() - read,
        "mapped": sizes["RssFile grew"],
        "anonymous": sizes["RssAnon"],
        "resident": sizes["VmRSS"],
        "shard": shard,
        "dtype": str(next(iter(model.parameters())).dtype).removeprefix("torch."),
        "versions": versions(),
    }


def look_at(model: Any) -> int:
    """Read every parameter of this rank once; their bytes."""
    total = 0
    for parameter in model.parameters():
        part = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        total += part.numel() * part.element_size()
        part.detach().max()
    return total


def read_calls() -> int:
    """Bytes that this process has read by system calls."""
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


def memory(names: Sequence[str]) -> dict[str, int]:
    """Lines of /proc/self/status, in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[name].split()[0]) * 1024 for name in names}


@contextmanager
def watched(*names: str, interval: float = 0.005) -> Iterator[dict[str, int]]:
    """Lines of /proc/self/status, sampled in a thread: by ``name`` how much each grew at its highest.

    By ``name grew``: all of its increases added up, which also counts what was let go in between.
    """
    before = memory(names)
    last, found, done = dict(before), dict.fromkeys(names, 0), threading.Event()
    found |= dict.fromkeys((f"{name} grew" for name in names), 0)

    def look() -> None:
        for name, now in memory(names).items():
            found[name] = max(found[name], now - before[name])
            found[f"{name} grew"] += max(0, now - last[name])
            last[name] = now

    def watch() -> None:
        while not done.wait(interval):
            look()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()
        look()


def measure(peer: Peer, case: Case, folder: Path, found: dict[Peer, list[Any]]) -> float:
    layout, dtype, _ = case
    with Contender(peer, layout.tp * layout.dp) as contender:
        asked = {
            "peer": peer.name,
            "folder": str(folder),
            "small": str(folder / "small"),
            "layout": vars(layout),
            "dtype": dtype,
        }
        answers = contender.call("loading:load", **asked)
    found.setdefault(peer, []).append(answers)
    return max(answer["seconds"] for answer in answers)


def run(case: Case, folder: Path, rounds: int, results: Results) -> None:
    layout, dtype, peers = case
    title = f"{layout.title}, {dtype}"
    able = []
    for peer in peers:  # a first time, which also brings the files into the page cache for all that follow
        with results.failures_of(f"{peer.title}, {title}"):
            measure(peer, case, folder, {})
            able.append(peer)
    found: dict[Peer, list[Any]] = {}
    seconds = in_turns({peer: partial(measure, peer, case, folder, found) for peer in able}, rounds)
    size = gigabytes(sum(file.stat().st_size for file in folder.glob("*.safetensors")))
    columns = ["contender", "median s", "spread", "ours / theirs", *(f"{what} GB" for what in PER_RANK), "dtype"]
    table = Table(f"{title}: a checkpoint of {size} GB; sizes per rank, the largest", columns)
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
        judge(title, seconds, most, results)


def judge(title: str, seconds: dict[Peer, list[float]], most: dict[Peer, Any], results: Results) -> None:
    """Time against the best peer; memory and bytes against every one."""
    peers = [peer for peer in seconds if peer != OURS]
    best = min(peers, key=lambda peer: median(seconds[peer]))
    value = median(ratio(seconds[OURS], seconds[best]))
    results.goal(f"{title}: time <= {GOAL_TIME} of the best ({best.title})", f"{value:.2f}", value <= GOAL_TIME)
    for text, mine, theirs in (
        ("less memory than every peer", most[OURS]["resident"], [most[peer]["resident"] for peer in peers]),
        ("fewer bytes read or mapped than every peer", touched(most[OURS]), [touched(most[peer]) for peer in peers]),
    ):
        measured = f"{gigabytes(mine)} GB; theirs {', '.join(map(gigabytes, theirs))} GB"
        results.goal(f"{title}: {text}", measured, mine < min(theirs))


def touched(most: dict[str, float]) -> float:
    return most["read"] + most["mapped"]


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f}"


def main() -> None:
    options = arguments(__doc__).parse_args()
    results = Results(
        "loading",
        "Loading a checkpoint of a few GB on two ranks",
        "Fresh processes for every load, files in the page cache, contenders in turns; imports are not counted. A load "
        "ends when every weight of the rank has been looked at once: mapped files are read no earlier. `read`: bytes "
        "of read calls. `mapped`: file pages that came into the rank's memory, increases added up. `anonymous`, "
        "`resident`: growth of the rank's own memory and of all its pages, at their highest. Sampled every 5 ms.",
    )
    with tempfile.TemporaryDirectory(prefix="bench-loading-") as scratch:
        folder = write_checkpoint(Path(scratch) / "llama", "llama", "bfloat16", **(QUICK if options.quick else SIZES))
        write_checkpoint(folder / "small", "llama", "bfloat16", num_hidden_layers=1)
        for case in CASES:
            run(case, folder, 1 if options.quick else 2, results)
            results.save()
    results.write()


if __name__ == "__main__":
    main()
