"""The estimate beside what was measured: our own rows on one GPU, and rows that others published.

`python benchmarks/estimate_rows.py --published FILE` prints a table with every row, the means and the worst errors, and
whether the order of layouts within one source is kept. Nothing in Shardwright is fitted to published rows; the
efficiencies are fitted to our own (`--fit`), which are named as such.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import LlamaConfig

from shardwright import ParallelConfig
from shardwright.distributed.config import Precision
from shardwright.distributed.plan import ParallelPlan
from shardwright.estimate.estimating import Estimate, estimate, read_model
from shardwright.estimate.hardware import Efficiencies, Machine, load_machine
from shardwright.estimate.speed import speed
from shardwright.estimate.step_memory import units_of
from shardwright.estimate.subject import Subject
from shardwright.estimate.trace.tracer import Tracer
from shardwright.estimate.workload import Workload

OWN = Path(__file__).parent / "RESULTS-GPU.md"
GIB, GB = 2**30, 1e9


@dataclass(frozen=True)
class Row:
    """One measurement, and what was measured: tokens a second of one GPU, bytes (allocated, or reserved)."""

    name: str
    source: str
    model: LlamaConfig
    weights: str
    config: ParallelConfig
    workload: Workload
    machine: Machine
    gpus: int
    tokens: float
    bytes: float
    reserved: bool = False


def own_rows() -> Iterator[Row]:
    """The rows of RESULTS-GPU.md whose variant is one of Shardwright's."""
    from gpu import HEADS, SHAPES  # type: ignore[import-not-found]

    text = OWN.read_text()
    heading = r"### (\w+): .*? parameters, 1 x (\d+) tokens\n(.*?)\n(?=\n###|\nFSDP2)"
    for name, length, table in re.findall(heading, text, re.S):
        for title, config in _variants():
            found = re.search(rf"\| {re.escape(title)} \| ([\d,]+) \|.*\| ([\d.]+) \|", table)
            if found is None:
                continue
            heads, key_values = HEADS[name]
            model = LlamaConfig(**SHAPES[name], num_attention_heads=heads, num_key_value_heads=key_values)
            yield Row(
                f"{name}, {title}", "own, one H200", model, "bfloat16", config,
                Workload(int(length), optimizer="adamw_fused"), load_machine("h200"), 1,
                float(found[1].replace(",", "")), float(found[2]) * GB,
            )  # fmt: skip


def _variants() -> list[tuple[str, ParallelConfig]]:
    plain = ParallelConfig(dp_shard=1)
    policy = plain.with_(precision=Precision("bfloat16", "float32", "bfloat16"))
    return [
        ("Shardwright, eager", plain),
        ("Shardwright, FSDP2 with bf16 policy, eager", policy),
        ("Shardwright, compiled blocks", plain.with_(compile=True)),
        ("Shardwright, FSDP2 with bf16 policy, compiled blocks", policy.with_(compile=True)),
        ("Shardwright, full checkpointing", plain.with_(activation_checkpointing="full")),
        ("Shardwright, selective checkpointing", plain.with_(activation_checkpointing="selective")),
    ]


def published_rows(path: Path) -> Iterator[Row]:
    """The rows that say enough; what the source does with no counterpart here (float8) is left out, and told."""
    for data in yaml.safe_load(path.read_text()):
        if data["float8"] is not None:
            print(f"left out: {data['id']} (float8 {data['float8']}: Shardwright has none)")
            continue
        model, layout, measured = data["model"], data["layout"], data["measured"]
        checkpointing = str(data["activation_checkpointing"] or "none").partition(" ")[0].rstrip(",")
        kept = "bfloat16" if str(data["precision"]["weights_kept_in"]).startswith("bf16") else "float32"
        bf16 = Precision("bfloat16", "float32", "bfloat16")
        fused = "fused" in data["optimizer"]
        config = ParallelConfig(
            dp_shard=layout["dp_shard"], dp_replicate=layout["dp_replicate"], tp=layout["tp"],
            sequence_parallel=layout["sp"], precision=bf16 if data["engine"].startswith("FSDP2") else Precision(),
            activation_checkpointing=checkpointing, compile=data["compile"] is not None,
            plan=_gathered_logits(data),
        )  # fmt: skip
        yield Row(
            data["id"], data["id"].partition("_")[0], _llama(model), kept, config,
            Workload(data["seq_len"], data["micro_batch_per_dp_rank"], data["grad_accum"],
                     "adamw_fused" if fused else "adamw", reduce_last_only=data["grad_accum"] > 1,
                     loss="model" if ".float()" in data["loss"]["kind"] else "logits"),
            _machine(data["gpu"]), data["gpus"], measured["tokens_per_s_per_gpu"], measured["peak_memory_gib"] * GIB,
            reserved="reserved" in measured["memory_kind"],
        )  # fmt: skip


def _gathered_logits(data: dict[str, Any]) -> str | None:
    """A plan for sources whose tensor parallelism replicates the embedding and gathers logits: they say so."""
    if not any("logits gathered to full vocabulary" in doubt for doubt in data["doubt"]) or data["layout"]["tp"] == 1:
        return None
    columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    styles = {f"model.layers.*.{name}": "colwise" for name in columns}
    styles |= {f"model.layers.*.{name}": "rowwise" for name in ("self_attn.o_proj", "mlp.down_proj")}
    path = Path(tempfile.gettempdir()) / "shardwright-gathered-logits.yaml"
    path.write_text(ParallelPlan(styles | {"lm_head": "colwise_gather_output"}).to_yaml())
    return str(path)


def _llama(model: dict[str, Any]) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=model["hidden"], intermediate_size=model["intermediate"], num_hidden_layers=model["layers"],
        num_attention_heads=model["heads"], num_key_value_heads=model["kv_heads"], head_dim=model["head_dim"],
        vocab_size=model["vocab"], tie_word_embeddings=model["tied"],
    )  # fmt: skip


def _machine(gpu: dict[str, Any]) -> Machine:
    """What a source says of its GPU, over the file of that device: memory bandwidth and power limit.

    Power goes with clock times voltage squared, and voltage with the clock: the clock goes with its cube root.
    """
    machine = load_machine("h200" if "H200" in gpu["name"] else "h100-80gb" if "H100" in gpu["name"] else "a100-80gb")
    stated = re.search(r"([\d.]+) TB/s", str(gpu["hbm"]))
    if stated:
        machine = replace(machine, device=replace(machine.device, memory_gb_per_s=float(stated[1]) * 1000))
    if gpu["power_limit_w"] and "SXM" in gpu["name"]:
        slower = (gpu["power_limit_w"] / 700) ** (1 / 3)
        peaks = {dtype: peak * slower for dtype, peak in machine.device.teraflops.items()}
        machine = replace(machine, device=replace(machine.device, teraflops=peaks))
    return machine


def estimated(row: Row, tracer: Tracer) -> Estimate:
    reading = read_model(row.model, row.weights)
    return estimate(reading, row.config, row.workload, row.machine, gpus=row.gpus, tracer=tracer)


def bytes_of(row: Row, found: Estimate) -> float:
    """What the source counted: what tensors take, or what the allocator reserves for them."""
    return found.peak.total + (found.overheads.fragmentation if row.reserved else 0)


def table(title: str, rows: list[Row]) -> list[Estimate]:
    print(f"\n## {title}\n")
    print("| row | tokens/s, measured | estimated | error of time | GiB, measured | estimated | error |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    times, memories, found = [], [], []
    for row in rows:
        made = estimated(row, Tracer())
        found.append(made)
        times.append(row.tokens / made.speed.tokens_per_second - 1)
        memories.append(bytes_of(row, made) / row.bytes - 1)
        print(
            f"| {row.name} | {row.tokens:,.0f} | {made.speed.tokens_per_second:,.0f} | {times[-1]:+.1%} | "
            f"{row.bytes / GIB:.1f} | {bytes_of(row, made) / GIB:.1f} | {memories[-1]:+.1%} |",
            flush=True,
        )
    for name, errors in (("time", times), ("memory", memories)):
        mean, worst = sum(map(abs, errors)) / len(errors), max(errors, key=abs)
        print(f"\n{name}: mean error {mean:.1%}, worst {worst:+.1%}")
    kept = order_kept(rows, found)
    print(f"\norder of speed kept in {kept[0]} of {kept[1]} pairs of rows of one source that differ by more than 2 %")
    return found


def order_kept(rows: list[Row], found: list[Estimate]) -> tuple[int, int]:
    right = pairs = 0
    for (a, x), (b, y) in combinations(zip(rows, found, strict=True), 2):
        if a.source == b.source and abs(a.tokens / b.tokens - 1) > 0.02 and a.name[:2] == b.name[:2]:
            pairs += 1
            right += (a.tokens < b.tokens) == (x.speed.tokens_per_second < y.speed.tokens_per_second)
    return right, pairs


def fit(rows: list[Row]) -> Efficiencies:
    """Efficiencies that make the mean error of time on ``rows`` least, by going along one of them at a time."""
    subjects = [Subject.of(read_model(row.model, row.weights), row.config, row.gpus) for row in rows]
    traces = [Tracer().trace(subject, row.workload).parts for row, subject in zip(rows, subjects, strict=True)]

    def error(values: Efficiencies) -> float:
        total = 0.0
        for row, subject, parts in zip(rows, subjects, traces, strict=True):
            machine = replace(row.machine, efficiencies=values)
            made = speed(subject, row.workload, machine, parts, units_of(subject))
            total += (row.tokens / made.tokens_per_second - 1) ** 2
        return (total / len(rows)) ** 0.5

    best = rows[0].machine.efficiencies
    least = error(best)
    for step in (0.1, 0.05, 0.02):
        for _ in range(2):
            for name in ("matmul", "memory", "fused"):
                for factor in (1 + step, 1 / (1 + step)):
                    while True:
                        trial = replace(best, **{name: round(getattr(best, name) * factor, 4)})
                        if not 0.05 < getattr(trial, name) <= 0.95 or (now := error(trial)) >= least:
                            break
                        best, least = trial, now
        print(f"step {step}: root mean square error {least:.2%} with {best}", flush=True)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--published", type=Path, help="a YAML file of published rows")
    parser.add_argument("--fit", action="store_true", help="fit the efficiencies to our own rows, and print them")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.fit:
        print(fit(list(own_rows())))
        return
    table("Our own rows (the efficiencies are fitted to these times; memory is fitted to nothing)", list(own_rows()))
    if options.published is not None:
        table("Published rows (nothing is fitted to these)", list(published_rows(options.published)))


if __name__ == "__main__":
    main()
