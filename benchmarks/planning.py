"""How long, and how much memory, does it take to plan and apply a Llama-3.1-405B on 16384 ranks?

One process plays rank 0 of torch's fake process group, the model is on meta: nothing is sent and nothing is stored. The
hand-written plan does the same with torch alone, in the same run: what torch itself takes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

from harness.contenders import HANDWRITTEN, OURS, Contender, Peer
from harness.layouts import Layout
from harness.machine import versions
from harness.results import Results, Table, arguments
from harness.statistics import spread

WORLD, TP = 16384, 8
# Replicas -> who is measured. FSDP2 over all data-parallel ranks, and HSDP.
LAYOUTS: dict[int, tuple[Peer, ...]] = {1: (OURS, HANDWRITTEN), 16: (OURS,)}
LLAMA_405B = {
    "vocab_size": 128256,
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
BOUND_SECONDS, BOUND_GB = 10.0, 2.0
SLOW_ROUNDS = 1  # of the hand-written plan, which takes three times as long
Apply = Callable[[Any, int, int, int], None]  # model, tp, shards, replicas


def plan_and_apply(peer: str, world: int, tp: int, replicas: int, sizes: dict[str, Any]) -> dict[str, Any]:
    """On rank 0 of a fake group: seconds by phase since the process started, and its peak memory."""
    began = _now()
    import torch
    from harness.worker import join
    from transformers import AutoConfig, AutoModelForCausalLM

    apply = _ours() if peer == OURS.name else _handwritten()
    marks = {"imports": _now()}
    join(0, world, "", "fake")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes), dtype=torch.bfloat16)
    marks["model on meta"] = _now()
    apply(model, tp, world // tp // replicas, replicas)
    marks["mesh, plan and apply"] = _now()
    phases, last = {}, began
    for name, moment in marks.items():
        phases[name], last = [moment[0] - last[0], moment[1] - last[1]], moment
    local = sum(parameter.to_local().numel() for parameter in model.parameters())
    return {"phases": phases, "gb": _peak_gb(), "local": local, "versions": versions()}


def _ours() -> Apply:
    from shardwright import ParallelConfig, parallelize

    def apply(model: Any, tp: int, shards: int, replicas: int) -> None:
        parallelize(
            model,
            ParallelConfig(tp=tp, dp_shard=shards, dp_replicate=replicas, sequence_parallel=True, precision="bf16"),
        )

    return apply


def _handwritten() -> Apply:
    from harness.peers.handwritten import shard

    def apply(model: Any, tp: int, shards: int, replicas: int) -> None:
        shard(model, Layout(tp=tp, dp=shards, sequence_parallel=True))

    return apply


def _now() -> tuple[float, float]:
    return time.monotonic(), time.process_time()


def _peak_gb() -> float:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def seconds_of(run: dict[str, Any], phase: str) -> tuple[float, float]:
    """(wall, processor) seconds of one phase, or of all."""
    chosen = list(run["phases"].values()) if phase == "in all" else [run["phases"][phase]]
    return sum(wall for wall, _ in chosen), sum(processor for _, processor in chosen)


def tabulate(title: str, found: dict[Peer, list[dict[str, Any]]], results: Results) -> None:
    table = Table(f"{title}: seconds by phase", ["contender", "phase", "wall", "spread", "processor time", "memory GB"])
    for peer, runs in found.items():
        for phase in (*runs[0]["phases"], "in all"):
            wall, processor = ([seconds_of(run, phase)[kind] for run in runs] for kind in (0, 1))
            memory = f"{max(run['gb'] for run in runs):.2f}" if phase == "in all" else ""
            row = [peer.title, phase, f"{median(wall):.2f}", spread(wall), f"{median(processor):.2f}", memory]
            table.rows.append(row)
    results.tables.append(table)


def judge(title: str, found: dict[Peer, list[dict[str, Any]]], results: Results) -> None:
    runs = found[OURS]
    wall, processor = (median(seconds_of(run, "in all")[kind] for run in runs) for kind in (0, 1))
    measured = f"{wall:.1f} s ({processor:.1f} s of processor time)"
    if HANDWRITTEN in found:
        bar = median(seconds_of(run, "in all")[1] for run in found[HANDWRITTEN])
        measured += f"; {processor / bar:.2f} of hand-written torch"
    results.goal(f"{title}: from process start < {BOUND_SECONDS:g} s", measured, wall < BOUND_SECONDS)
    memory = max(run["gb"] for run in runs)
    results.goal(f"{title}: memory < {BOUND_GB:g} GB", f"{memory:.2f} GB", memory < BOUND_GB)


def main() -> None:
    options = arguments(__doc__).parse_args()
    results = Results(
        "planning",
        f"Planning and applying a Llama-3.1-405B shape on {WORLD} ranks",
        "With sequence parallelism, bf16, on torch's fake process group, from the first "
        "import to the sharded model, in a fresh process each time. Memory: peak resident size.",
    )
    for replicas, peers in LAYOUTS.items():
        found: dict[Peer, list[dict[str, Any]]] = {}
        for turn in range(1 if options.quick else 3):
            for peer in peers if turn < SLOW_ROUNDS else peers[:1]:
                with results.failures_of(peer.title), Contender(peer, backend="none") as contender:
                    call = {"peer": peer.name, "world": WORLD, "tp": TP, "replicas": replicas, "sizes": LLAMA_405B}
                    found.setdefault(peer, []).extend(contender.call("planning:plan_and_apply", **call))
        shards = WORLD // TP // replicas
        title = f"FSDP2 {shards} x TP {TP}" if replicas == 1 else f"HSDP {replicas} x {shards} x TP {TP}"
        results.versions |= {peer.title: runs[0]["versions"] for peer, runs in found.items()}
        tabulate(title, found, results)
        if OURS in found:
            judge(title, found, results)
    results.write()


if __name__ == "__main__":
    main()
