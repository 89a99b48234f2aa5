"""``docs/architectures.md``: the zoo's entries as a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import transformers

from shardwright import __version__

if TYPE_CHECKING:
    from shardwright.verify.zoo import Entry

LONGEST_REASON = 200


def write_page(entries: Sequence[Entry], titles: Mapping[str, str]) -> str:
    """Markdown: versions and command, counts, a row per type, then the reasons."""
    modes = [mode for mode in titles if any(entry.mode == mode for entry in entries)]
    by_type: dict[str, dict[str, Entry]] = {}
    for entry in entries:
        by_type.setdefault(entry.type, {})[entry.mode] = entry
    lines = [
        *_header(modes),
        *_counts(by_type, modes, titles),
        *_table(by_type, modes, titles),
        *_reasons(entries, titles),
    ]
    return "\n".join(lines) + "\n"


def _header(modes: Sequence[str]) -> list[str]:
    return [
        "# Architectures",
        "",
        "Written by `python -m shardwright.verify.zoo` (`make zoo` for all modes), not by hand; modes of this run: "
        f"{', '.join(modes)}.",
        f"Shardwright {__version__}, torch {torch.__version__}, transformers {transformers.__version__}, float32, gloo "
        "ranks on one machine.",
        "",
        "Every causal-LM and image-text-to-text type of transformers is shrunk to a tiny model of the same",
        "architecture, trained for one step in one process and on N ranks, and compared: loss, logits, the gradient",
        "of every parameter, the clipped norm, every parameter after an AdamW step. *Exact* means that every relative",
        "error is below 1e-5. The FSDP modes accumulate two micro-batches on each data-parallel rank. *Sharded* is",
        "the share of the elements of the text model's matrices, embeddings included, that tensor parallelism splits.",
        "",
    ]


def _counts(by_type: Mapping[str, Mapping[str, Entry]], modes: Sequence[str], titles: Mapping[str, str]) -> list[str]:
    outcomes = ("exact", "wrong", "crashed", "refused", "not built")
    lines = ["| | " + " | ".join(outcomes) + " |", "| --- |" + " ---: |" * len(outcomes)]
    for mode in modes:
        # A type that cannot be built has an entry for the first mode only.
        found = [row.get(mode, next(iter(row.values()))).outcome for row in by_type.values()]
        lines.append(f"| {titles[mode]} | " + " | ".join(str(found.count(outcome)) for outcome in outcomes) + " |")
    return [*lines, ""]


def _table(by_type: Mapping[str, Mapping[str, Entry]], modes: Sequence[str], titles: Mapping[str, str]) -> list[str]:
    columns = ["type", "inputs", "plan", "sharded", *(titles[mode] for mode in modes)]
    lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    for model_type, row in sorted(by_type.items()):
        ran = next((entry for entry in row.values() if entry.plan_source), None)
        source = ran.plan_source if ran else ""
        inputs = ran.inputs if ran else ""
        fraction = f"{ran.sharded_fraction:.0%}" if ran else ""
        cells = [_cell(row[mode]) if mode in row else "" for mode in modes]
        lines.append(f"| {' | '.join([model_type, inputs, source, fraction, *cells])} |")
    return [*lines, ""]


def _cell(entry: Entry) -> str:
    return entry.outcome if entry.outcome == "exact" else f"**{entry.outcome}**"


def _reasons(entries: Sequence[Entry], titles: Mapping[str, str]) -> list[str]:
    lines = ["## Not exact, and why", ""]
    for entry in entries:
        if entry.outcome != "exact":
            reason = " ".join(entry.reason.split()).replace("|", "/")
            short = reason if len(reason) <= LONGEST_REASON else reason[:LONGEST_REASON] + "..."
            where = "" if entry.outcome == "not built" else f", {titles[entry.mode]}"
            lines.append(f"- {entry.type}{where}: {entry.outcome}: {short}")
    return [*lines, ""]
