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
LENGTH = 128
PLAIN = (OURS, HANDWRITTEN, TRANSFORMERS, AUTOMODEL)
LAYOUTS: dict[Layout, tuple[Peer, ...]] = {
    Layout(tp=2): PLAIN,
    Layout(tp=2, sequence_parallel=True): (OURS, HANDWRITTEN, AUTOMODEL),
    Layout(dp=2): (*PLAIN, ACCELERATE),
    Layout(tp=4): PLAIN,
    Layout(dp=4): PLAIN,
    Layout(tp=2, dp=2): PLAIN,
}
# Of the peers' time under tensor parallelism; of hand-written torch's everywhere.
GOAL_TP, GOAL_BAR = 0.85, 1.0
Seconds = dict[Peer, list[float]]
_state: dict[str, Any] = {}  # of this rank, between calls


def build(peer: str, folder: str, layout: dict[str, Any]) -> dict[str, Any]:
    """On a rank: make the model and the optimizer of the next calls; how much of the weights this rank holds."""
    import torch
    from torch.distributed.tensor import DTensor

    sharded = import_module(f"harness.peers.{peer}").build(folder, Layout(**layout))
    optimizer = torch.optim.AdamW(sharded.model.parameters(), lr=1e-4)
    _state.update(sharded=sharded, optimizer=optimizer, tp=layout["tp"], rows=1 if layout["dp"] > 1 else 2)
    parameters = list(sharded.model.parameters())
    held = sum((part.to_local() if isinstance(part, DTensor) else part).numel() for part in parameters)
    share = held / sum(part.numel() for part in parameters)
    return {"versions": versions(), "loss": step()["loss"], "next": step()["loss"], "share": share}


def step() -> dict[str, float]:
    """On a rank: wall and processor seconds of one step, and its loss; the ranks start together."""
    import time

    import torch.distributed as dist

    batch = batch_of(_state["rows"], LENGTH, SIZES["vocab_size"], seed=dist.get_rank() // _state["tp"])
    dist.barrier()
    began, busy = time.perf_counter(), time.process_time()
    loss = _state["sharded"].backward(batch)
    _state["optimizer"].step()
    _state["optimizer"].zero_grad()
    dist.barrier()
    return {"wall": time.perf_counter() - began, "busy": time.process_time() - busy, "loss": float(loss)}


def run(layout: Layout, forks: dict[Peer, Nursery], folder: Path, rounds: int, results: Results) -> Seconds:
    """Wall seconds of the steps of each contender that runs; a table is added to ``results``."""
    with ExitStack() as stack:
        running: dict[Peer, Contender] = {}
        checks = {}
        for peer in LAYOUTS[layout]:
            contender = stack.enter_context(Contender(peer, layout.tp * layout.dp, nursery=forks.get(peer)))
            with results.failures_of(f"{peer.title}, {layout.title}"):
                asked = {"peer": peer.name, "folder": str(folder), "layout": vars(layout)}
                built = contender.call("step_time:build", **asked)[0]
                results.versions[peer.title] = built["versions"]
                checks[peer] = [f"{built['share']:.2f}", f"{built['loss']:.4f}, {built['next']:.4f}"]
                running[peer] = contender
        seconds = in_turns({peer: partial(_wall, contender) for peer, contender in running.items()}, rounds)
    table = Table(
        layout.title, ["contender", "median s", "spread", "ours / theirs (spread)", "share of weights", "losses"]
    )
    for peer, values in seconds.items():
        against = ratio_text(seconds[OURS], values) if OURS in seconds else ""
        table.rows.append([peer.title, f"{median(values):.3f}", spread(values), against, *checks[peer]])
    results.tables.append(table)
    return seconds


def _wall(contender: Contender) -> float:
    return max(answer["wall"] for answer in contender.call("step_time:step"))


def judge(layout: Layout, seconds: dict[Peer, list[float]], results: Results) -> None:
    for peer in (HANDWRITTEN, TRANSFORMERS, AUTOMODEL):
        if peer not in LAYOUTS[layout] or (peer != HANDWRITTEN and layout.tp == 1):
            continue
        bound = GOAL_BAR if peer == HANDWRITTEN else GOAL_TP
        if peer not in seconds or OURS not in seconds:
            results.goal(f"{layout.title}: <= {bound:.2f} of {peer.title}", "could not run", None)
            continue
        value = median(ratio(seconds[OURS], seconds[peer]))
        results.goal(f"{layout.title}: <= {bound:.2f} of {peer.title}", f"{value:.2f}", value <= bound)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--layouts", type=int, nargs="*", help="Only these, by number from 0.")
    options = parser.parse_args()
    results = Results(
        "step_time",
        "Training step, 2 and 4 gloo ranks",
        f"57M-parameter Llama, float32, 2 x {LENGTH} tokens, or 1 x {LENGTH} for each of several data-parallel ranks; "
        "forward, backward and stock AdamW, one thread a rank. All contenders alive at once, one step each in turns; "
        "ratios are medians of the rounds' ratios.",
    )
    with tempfile.TemporaryDirectory(prefix="bench-step-") as scratch, nurseries((*PLAIN, ACCELERATE)) as forks:
        folder = write_checkpoint(Path(scratch) / "llama", "llama", **SIZES)
        for number, layout in enumerate(LAYOUTS):
            if not options.layouts or number in options.layouts:
                seconds = run(layout, forks, folder, 2 if options.quick else 5, results)
                judge(layout, seconds, results)
                results.save()
    results.write()


if __name__ == "__main__":
    main()
