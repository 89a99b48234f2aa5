"""The estimate beside what was measured: our own rows on one GPU, and rows that others published.

`python benchmarks/estimate_rows.py --published FILE` prints a table with every row, the means and the worst errors, and
whether the order of layouts within one source is kept. Nothing in Shardwright is fitted to published rows; the
efficiencies are fitted to our own (`--fit`), which are named as such.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import torch
from published import GIB, Row, published_rows  # type: ignore[import-not-found]
from transformers import LlamaConfig

from shardwright import ParallelConfig
from shardwright.distributed.precision import Precision
from shardwright.estimate.estimating import Estimate, assembled, read_model
from shardwright.estimate.hardware import Efficiencies, load_machine
from shardwright.estimate.speed import speed
from shardwright.estimate.subject import Subject
from shardwright.estimate.trace.tracer import Tracer
from shardwright.estimate.workload import Workload

OWN = Path(__file__).parent / "RESULTS-GPU.md"
GB = 1e9
LEAST_DIFFERENCE = 0.02


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


def estimated(row: Row, tracer: Tracer) -> Estimate:
    """Of the row's program, where it decides otherwise than Shardwright."""
    subject = Subject.of(read_model(row.model, row.weights), row.config, row.gpus)
    if row.framework is not None:
        subject = replace(subject, decided=row.framework.decided(subject.decided))
    traced = tracer.trace(subject, row.workload)
    if row.framework is not None:
        traced = replace(traced, parts=row.framework.parts(traced.parts))
    return assembled(subject, row.workload, row.machine, traced)


def bytes_of(row: Row, found: Estimate) -> float:
    """What the source counted: tensors, what the allocator reserves for them, or all that the driver shows."""
    if row.counted == "allocated":
        return found.peak.total
    return found.reserved + (found.overheads.context + found.overheads.communicators) * (row.counted == "device")


def table(title: str, rows: list[Row]) -> None:
    print(f"\n## {title}\n")
    print("| row | tokens/s, measured | estimated | error of time | GiB, measured | estimated | error |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    times, memories, found = [], [], []
    for row in rows:
        made = estimated(row, Tracer())
        found.append(made)
        cells = ["-"] * 6
        if row.tokens is not None:
            times.append(row.tokens / made.speed.tokens_per_second - 1)
            cells[:3] = f"{row.tokens:,.0f}", f"{made.speed.tokens_per_second:,.0f}", f"{times[-1]:+.1%}"
        if row.bytes is not None:
            memories.append(bytes_of(row, made) / row.bytes - 1)
            cells[3:] = f"{row.bytes / GIB:.1f}", f"{bytes_of(row, made) / GIB:.1f}", f"{memories[-1]:+.1%}"
        print(f"| {row.name} | {' | '.join(cells)} |", flush=True)
    for name, errors in (("time", times), ("memory", memories)):
        if errors:
            mean, worst = sum(map(abs, errors)) / len(errors), max(errors, key=abs)
            print(f"\n{name}: mean error {mean:.1%}, worst {worst:+.1%}, of {len(errors)} rows")
    kept = order_kept(rows, found)
    print(f"\norder of speed kept in {kept[0]} of {kept[1]} pairs of rows of one source that differ by more than 2 %")


def order_kept(rows: list[Row], found: list[Estimate]) -> tuple[int, int]:
    """How many pairs of rows of one source and model are in their order, and how many there are."""
    right = pairs = 0
    for (a, x), (b, y) in combinations(zip(rows, found, strict=True), 2):
        if a.tokens is None or b.tokens is None or a.source != b.source:
            continue
        if a.model.to_dict() == b.model.to_dict() and abs(a.tokens / b.tokens - 1) > LEAST_DIFFERENCE:
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
            made = speed(subject, row.workload, machine, parts)
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
