"""How long does a training step take: forward, backward and AdamW of a 57M-parameter Llama on real gloo ranks.

All contenders are alive at once and take turns, so that whatever else happens on the machine happens to all.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

from harness.contenders import ACCELERATE, AUTOMODEL, HANDWRITTEN, OURS, TRANSFORMERS, Contender, Peer, nurseries
from harness.layouts import Layout
from harness.machine import versions
from harness.nursery import Nursery
from harness.results import Results, Table, arguments
from harness.shapes import batch_of, write_checkpoint
from harness.statistics import in_turns, ratio, ratio_text, spread

SIZES = {
    "vocab_size": 16384,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
LENGTH, LONG = 128, 512  # positions of a row; and of those that are split over ranks
PLAIN = (OURS, HANDWRITTEN, TRANSFORMERS, AUTOMODEL)
LAYOUTS: dict[Layout, tuple[Peer, ...]] = {
    Layout(tp=2): PLAIN,
    Layout(tp=2, sequence_parallel=True): (OURS, HANDWRITTEN, AUTOMODEL),
    Layout(dp=2): (*PLAIN, ACCELERATE),
    Layout(tp=4): PLAIN,
    Layout(dp=4): PLAIN,
    Layout(tp=2, dp=2): PLAIN,
    Layout(cp=2): (OURS, HANDWRITTEN),
    Layout(cp=4): (OURS, HANDWRITTEN),
}
# Of the peers' time under tensor parallelism; of hand-written torch's everywhere, and where the sequence is split.
GOAL_TP, GOAL_BAR, GOAL_CP = {TRANSFORMERS: 0.85, AUTOMODEL: 0.85}, 1.0, 1.05
Seconds = dict[Peer, list[float]]
_state: dict[str, Any] = {}  # of this rank, between calls


def build(peer: str, folder: str, layout: dict[str, Any]) -> dict[str, Any]:
    """On a rank: make the model and the optimizer of the next calls; how much of the weights this rank holds."""
    import torch
    from torch.distributed.tensor import DTensor

    sharded = import_module(f"harness.peers.{peer}").build(folder, Layout(**layout))
    optimizer = torch.optim.AdamW(sharded.model.parameters(), lr=1e-4)
    _state.update(
        sharded=sharded,
        optimizer=optimizer,
        sharers=layout["tp"] * layout["cp"],
        rows=1 if layout["dp"] > 1 else 2,
        length=LONG if layout["cp"] > 1 else LENGTH,
    )
    parameters = list(sharded.model.parameters())
    held = sum((part.to_local() if isinstance(part, DTensor) else part).numel() for part in parameters)
    share = held / sum(part.numel() for part in parameters)
    return {"versions": versions(), "loss": step()["loss"], "next": step()["loss"], "share": share}


def step() -> dict[str, float]:
    """On a rank: wall and processor seconds of one step, and its loss; the ranks start together."""
    import time

    import torch.distributed as dist

    batch = batch_of(_state["rows"], _state["length"], SIZES["vocab_size"], seed=dist.get_rank() // _state["sharers"])
    dist.barrier()
    began, busy = time.perf_counter(), time.process_time()
    loss = _state["sharded"].backward(batch)
    _state["optimizer"].step()
    _state["optimizer"].zero_grad()
    dist.barrier()
    return {"wall": time.perf_counter() - began, "busy": time.process_time() - busy, "loss": float(loss)}


def sent() -> dict[str, float]:
    """On a rank: the collectives of one step, and the megabytes that the rank sends in them."""
    from harness.counting import CollectiveCounter

    with CollectiveCounter() as counter:
        step()
    return {"calls": len(counter.calls), "MB": sum(call.sent for call in counter.calls) / 1e6}


def profile() -> list[list[Any]]:
    """On a rank: the operations that take the most time of their own in one step, in milliseconds."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    with profiled(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)[:10]
    return [[event.key, event.count, f"{event.self_cpu_time_total / 1e3:.1f}"] for event in events]


def run(layout: Layout, forks: dict[Peer, Nursery], folder: Path, rounds: int, results: Results) -> Seconds:
    """Wall seconds of the steps of each contender that runs; tables are added to ``results``."""
    with ExitStack() as stack:
        running: dict[Peer, Contender] = {}
        checks = {}
        for peer in LAYOUTS[layout]:
            contender = stack.enter_context(Contender(peer, layout.ranks, nursery=forks.get(peer)))
            with results.failures_of(f"{peer.title}, {layout.title}"):
                asked = {"peer": peer.name, "folder": str(folder), "layout": vars(layout)}
                built = contender.call("step_time:build", **asked)[0]
                results.versions[peer.title] = built["versions"]
                checks[peer] = [f"{built['share']:.2f}", f"{built['loss']:.4f}, {built['next']:.4f}"]
                running[peer] = contender
        seconds = in_turns({peer: partial(_wall, contender) for peer, contender in running.items()}, rounds)
        counts = {peer: contender.call("step_time:sent")[0] for peer, contender in running.items()}
        profiles = _profiles_where_missed(layout, seconds, running)
    columns = ["contender", "median s", "spread", "ours / theirs (spread)", "collectives", "MB sent"]
    table = Table(layout.title, [*columns, "share of weights", "losses"])
    for peer, values in seconds.items():
        against = ratio_text(seconds[OURS], values) if OURS in seconds else ""
        moved = [str(counts[peer]["calls"]), f"{counts[peer]['MB']:.1f}"]
        table.rows.append([peer.title, f"{median(values):.3f}", spread(values), against, *moved, *checks[peer]])
    results.tables += [table, *profiles]
    return seconds


def _profiles_where_missed(layout: Layout, seconds: Seconds, running: dict[Peer, Contender]) -> list[Table]:
    """Where the time goes, ours and theirs, for every bound that is not kept."""
    missed = [peer for peer, bound in bounds(layout).items() if (value := of_theirs(seconds, peer)) and value > bound]
    return [
        Table(
            f"{layout.title}: where the time of a step goes, {peer.title}, rank 0",
            ["operation", "calls", "own ms"],
            running[peer].call("step_time:profile")[0],
        )
        for peer in ((OURS, *missed) if missed else ())
    ]


def _wall(contender: Contender) -> float:
    return max(answer["wall"] for answer in contender.call("step_time:step"))


def bounds(layout: Layout) -> dict[Peer, float]:
    """What share of each peer's time ours may be."""
    peers = GOAL_TP if layout.tp > 1 else {}
    bar = {HANDWRITTEN: GOAL_CP if layout.cp > 1 else GOAL_BAR}
    return {peer: bound for peer, bound in (bar | peers).items() if peer in LAYOUTS[layout]}


def of_theirs(seconds: Seconds, peer: Peer) -> float | None:
    """Our time over theirs; None where one of the two could not run."""
    return median(ratio(seconds[OURS], seconds[peer])) if OURS in seconds and peer in seconds else None


def judge(layout: Layout, seconds: Seconds, results: Results) -> None:
    for peer, bound in bounds(layout).items():
        value = of_theirs(seconds, peer)
        measured = "could not run" if value is None else f"{value:.2f}"
        results.goal(
            f"{layout.title}: <= {bound:.2f} of {peer.title}", measured, None if value is None else value <= bound
        )


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--layouts", type=int, nargs="*", help="Only these, by number from 0.")
    options = parser.parse_args()
    results = Results(
        "step_time",
        "Training step, 2 and 4 gloo ranks",
        f"57M-parameter Llama, float32, 2 x {LENGTH} tokens, or 1 x {LENGTH} for each of several data-parallel ranks, "
        f"or 2 x {LONG} that context-parallel ranks share; forward, backward and stock AdamW, one thread a rank. All "
        "contenders alive at once, one step each in turns; "
        "ratios are medians of the rounds' ratios. Collectives, and what a rank sends in them, are counted in one step "
        "that is not timed.",
    )
    layouts = [layout for number, layout in enumerate(LAYOUTS) if not options.layouts or number in options.layouts]
    peers = dict.fromkeys(peer for layout in layouts for peer in LAYOUTS[layout])
    with tempfile.TemporaryDirectory(prefix="bench-step-") as scratch, nurseries(peers) as forks:
        folder = write_checkpoint(Path(scratch) / "llama", "llama", **SIZES)
        for layout in layouts:
            seconds = run(layout, forks, folder, 2 if options.quick else 9, results)
            judge(layout, seconds, results)
            results.save()
    results.write()


if __name__ == "__main__":
    main()
