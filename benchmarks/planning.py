"""How long, and how much memory, does it take to plan and apply a Llama-3.1-405B on 16384 ranks?

One process plays rank 0 of torch's fake process group, the model is on meta: nothing is sent and nothing is stored.
"""

from __future__ import annotations

import time
from statistics import median
from typing import Any

from harness.contenders import OURS, Contender
from harness.machine import versions
from harness.results import Results, Table, arguments
from harness.statistics import spread

WORLD, TP = 16384, 8
REPLICAS = (1, 16)  # FSDP2 over all data-parallel ranks, and HSDP
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


def plan_and_apply(world: int, tp: int, replicas: int, sizes: dict[str, Any]) -> dict[str, Any]:
    """On rank 0 of a fake group: seconds by phase since the process started, and its peak memory."""
    began = (time.monotonic(), time.process_time())
    import torch
    from harness.worker import join
    from transformers import AutoConfig, AutoModelForCausalLM

    from shardwright import ParallelConfig, make_mesh
    from shardwright import parallelize as apply

    def now() -> tuple[float, float]:
        return time.monotonic(), time.process_time()

    marks = {"imports": now()}
    join(0, world, "", "fake")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes), dtype=torch.bfloat16)
    marks["model on meta"] = now()
    config = ParallelConfig(tp=tp, dp_replicate=replicas, sequence_parallel=True, precision="bf16")
    mesh = make_mesh(config)
    marks["mesh"] = now()
    apply(model, config, mesh)
    marks["plan and apply"] = now()
    phases, last = {}, began
    for name, moment in marks.items():
        phases[name], last = [moment[0] - last[0], moment[1] - last[1]], moment
    local = sum(parameter.to_local().numel() for parameter in model.parameters())
    return {"phases": phases, "gb": _peak_gb(), "local": local, "versions": versions()}


def _peak_gb() -> float:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def seconds_of(run: dict[str, Any], phase: str) -> tuple[float, float]:
    """(wall, processor) seconds of one phase, or of all."""
    chosen = list(run["phases"].values()) if phase == "in all" else [run["phases"][phase]]
    return sum(wall for wall, _ in chosen), sum(processor for _, processor in chosen)


def judge(title: str, runs: list[dict[str, Any]], results: Results) -> None:
    table = Table(f"{title}: seconds by phase", ["phase", "wall", "spread", "processor time"])
    for phase in (*runs[0]["phases"], "in all"):
        wall, processor = ([seconds_of(run, phase)[kind] for run in runs] for kind in (0, 1))
        table.rows.append([phase, f"{median(wall):.2f}", spread(wall), f"{median(processor):.2f}"])
    results.tables.append(table)
    for phase in ("plan and apply", "in all"):
        wall, processor = (median(seconds_of(run, phase)[kind] for run in runs) for kind in (0, 1))
        measured = f"{wall:.1f} s ({processor:.1f} s of processor time)"
        results.goal(f"{title}: {phase} < {BOUND_SECONDS:g} s", measured, wall < BOUND_SECONDS)
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
    for replicas in REPLICAS:
        runs = []
        for _ in range(1 if options.quick else 3):
            with results.failures_of(OURS.title), Contender(OURS, backend="none") as ours:
                call = {"world": WORLD, "tp": TP, "replicas": replicas, "sizes": LLAMA_405B}
                runs += ours.call("planning:plan_and_apply", **call)
        shards = WORLD // TP // replicas
        title = f"FSDP2 {shards} x TP {TP}" if replicas == 1 else f"HSDP {replicas} x {shards} x TP {TP}"
        if runs:
            results.versions[OURS.title] = runs[0]["versions"]
            judge(title, runs, results)
    results.write()


if __name__ == "__main__":
    main()
