"""How much Python time does a training step cost on top of its arithmetic: 128 layers of tiny tensors.

One process plays rank 0 of two on torch's fake process group, so nothing waits for anything. Processor time of a
forward and a backward, contenders in turns; then one profiled step, and a count of the operations that went through
DTensor's dispatcher.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from contextlib import ExitStack
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

from harness.contenders import AUTOMODEL, HANDWRITTEN, OURS, TRANSFORMERS, Contender, Peer, nurseries
from harness.layouts import Layout, Sharded
from harness.machine import versions
from harness.nursery import Nursery
from harness.results import Results, Table, arguments
from harness.shapes import batch_of, write_checkpoint
from harness.statistics import in_turns, ratio, ratio_text, spread

LAYERS, TP = 128, 2
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
CONTENDERS = (OURS, HANDWRITTEN, TRANSFORMERS, AUTOMODEL)
LAYOUTS = (Layout(tp=TP), Layout(tp=TP, sequence_parallel=True))
_models: dict[str, Sharded] = {}  # of this rank, between calls


def build(peer: str, folder: str, layout: dict[str, Any]) -> dict[str, Any]:
    """On a rank: make the model of the next calls, and warm it up."""
    _models["model"] = import_module(f"harness.peers.{peer}").build(folder, Layout(**layout))
    step()
    return versions()


def step() -> float:
    """On a rank: processor seconds of one step."""
    import gc
    import time

    batch = batch_of(1, 8, 256, seed=0)
    gc.collect()
    began = time.process_time()
    _models["model"].backward(batch)
    seconds = time.process_time() - began
    _models["model"].model.zero_grad()
    return seconds


def operations() -> dict[str, dict[str, int]]:
    """On a rank: the operations of one step on DTensors, by name; forward inside of a block, and all."""
    from harness.dtensor_ops import DTensorOperations

    sharded = _models["model"]
    with DTensorOperations(list(sharded.model.model.layers)) as counter:
        sharded.backward(batch_of(1, 8, 256, seed=0))
    sharded.model.zero_grad()
    return {"blocks": dict(counter.inside), "all": dict(counter.everywhere)}


def profile() -> list[list[Any]]:
    """On a rank: the functions that take the most time of their own in one step."""
    import cProfile
    import pstats
    import time

    profiler = cProfile.Profile(time.process_time)
    profiler.enable()
    _models["model"].backward(batch_of(1, 8, 256, seed=0))
    profiler.disable()
    _models["model"].model.zero_grad()
    rows = []
    for (file, _, function), (_, calls, own, cumulative, _) in pstats.Stats(profiler).stats.items():  # type: ignore
        rows.append([f"{'/'.join(Path(file).parts[-2:])}:{function}", calls, round(own, 4), round(cumulative, 4)])
    return sorted(rows, key=lambda row: -row[2])[:12]


def measure(layout: Layout, folder: Path, forks: dict[Peer, Nursery], rounds: int, results: Results) -> None:
    table = Table(
        f"{layout.title}: processor seconds of a step",
        [
            "contender",
            "median",
            "spread",
            "ours / theirs",
            "DTensor operations per layer",
            "of them in blocks' forward",
        ],
    )
    with ExitStack() as stack:
        contenders, counts = {}, {}
        for peer in CONTENDERS:
            with results.failures_of(f"{peer.title}, {layout.title}"):
                contender = stack.enter_context(Contender(peer, TP, "fake", forks.get(peer)))
                arguments = {"peer": peer.name, "folder": str(folder), "layout": vars(layout)}
                results.versions[peer.title] = contender.call("host_overhead:build", **arguments)[0]
                counts[peer] = contender.call("host_overhead:operations")[0]
                contenders[peer] = contender
        runners = {peer: partial(_step, contender) for peer, contender in contenders.items()}
        seconds = in_turns(runners, rounds)
        profiles = {peer: contenders[peer].call("host_overhead:profile")[0] for peer in contenders}
    for peer, values in seconds.items():
        per_layer = sum(counts[peer]["all"].values()) / LAYERS
        inside = Counter(counts[peer]["blocks"])
        names = ", ".join(f"{name} {number / LAYERS:.1f}" for name, number in inside.most_common(6)) or "none"
        against = ratio_text(seconds[OURS], values) if OURS in seconds else ""
        table.rows.append([peer.title, f"{median(values):.3f}", spread(values), against, f"{per_layer:.1f}", names])
    results.tables.append(table)
    for peer in (OURS, HANDWRITTEN):
        if peer in profiles:
            columns = ["function", "calls", "own seconds", "with callees"]
            results.tables.append(Table(f"{layout.title}: profile of {peer.title}", columns, profiles[peer]))
    judge(layout, seconds, counts, results)


def _step(contender: Contender) -> float:
    return float(contender.call("host_overhead:step")[0])


def judge(layout: Layout, seconds: dict[Any, list[float]], counts: dict[Any, Any], results: Results) -> None:
    text = f"{layout.title}: Python time <= hand-written torch"
    if OURS in seconds and HANDWRITTEN in seconds:
        value = median(ratio(seconds[OURS], seconds[HANDWRITTEN]))
        results.goal(text, f"{value:.2f} of it", value <= 1.0)
    else:
        results.goal(text, "could not run", None)
    if OURS in counts:
        number = sum(counts[OURS]["blocks"].values())
        results.goal(f"{layout.title}: no DTensor dispatch in the blocks' forward", f"{number} operations", number == 0)


def main() -> None:
    options = arguments(__doc__).parse_args()
    results = Results(
        "host_overhead",
        f"Host overhead: Python time of a step, {LAYERS} layers of tiny tensors",
        "One process on torch's fake process group (rank 0 of 2), forward and backward of 8 tokens, processor time, "
        "contenders in turns. DTensor operations are counted by a dispatch mode that sees them before DTensor does.",
    )
    with tempfile.TemporaryDirectory(prefix="bench-host-") as scratch, nurseries(CONTENDERS) as forks:
        folder = write_checkpoint(Path(scratch) / "llama", "llama", num_hidden_layers=LAYERS, **SIZES)
        for layout in LAYOUTS:
            measure(layout, folder, forks, 3 if options.quick else 9, results)
            results.save()
    results.write()


if __name__ == "__main__":
    main()
