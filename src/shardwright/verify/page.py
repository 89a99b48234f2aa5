"""``docs/architectures.md``: the zoo's entries as a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import transformers

from shardwright import __version__

if TYPE_CHECKING:
    from shardwright.verify.zoo import Entry

LONGEST_REASON = 200


@dataclass(frozen=True)
class Page:
    """What a page says before its numbers.

    Attributes:
        title: its heading.
        command: that wrote it.
        text: lines behind the versions.
        share: the heading of the column that says how much was split, and the attribute of an entry that it shows;
            None: there is no such column, nor one of the plan.
    """

    title: str
    command: str
    text: tuple[str, ...]
    share: tuple[str, str] | None = None


_COMPARED = (
    "architecture, trained for two steps in one process and on N ranks, and compared: loss, logits, the gradient",
    "of every parameter, the clipped norm, every parameter after an AdamW step. *Exact* means that every relative",
    "error is below 1e-5. The FSDP modes accumulate two micro-batches on each data-parallel rank.",
)
ARCHITECTURES = Page(
    "Architectures",
    "`python -m shardwright.verify.zoo` (`make zoo` for all modes)",
    (
        "Every causal-LM and image-text-to-text type of transformers is shrunk to a tiny model of the same",
        *_COMPARED,
        "*Sharded* is the share of the elements of the text model's matrices, embeddings included, that tensor",
        "parallelism splits.",
    ),
    ("sharded", "sharded_fraction"),
)
EXPERTS_PAGE = Page(
    "Experts on ranks of their own",
    "`python -m shardwright.verify.zoo --experts` (`make zoo-experts` for all modes)",
    (
        "Every type of transformers whose config states several experts is shrunk to a tiny model of the same",
        *_COMPARED,
        "*Spread* is the share of the elements of all parameters that are experts on ranks of their own.",
        "[Experts](experts.md) says how it works.",
    ),
    ("spread", "spread_fraction"),
)
CONTEXT_PAGE = Page(
    "Types with a split sequence",
    "`python -m shardwright.verify.zoo --context` (`make zoo-context` for all modes)",
    (
        "Every causal-LM and image-text-to-text type of transformers is shrunk to a tiny model of the same",
        *_COMPARED,
        "[Long sequences](long-context.md) says how it works, and `shardwright plan MODEL --cp 2` how attention of a",
        "model is handled.",
    ),
)


def write_page(entries: Sequence[Entry], titles: Mapping[str, str], page: Page = ARCHITECTURES) -> str:
    """Markdown: versions and command, counts, a row per type, then the reasons."""
    modes = [mode for mode in titles if any(entry.mode == mode for entry in entries)]
    by_type: dict[str, dict[str, Entry]] = {}
    for entry in entries:
        by_type.setdefault(entry.type, {})[entry.mode] = entry
    lines = [
        *_header(modes, page),
        *_counts(by_type, modes, titles),
        *_table(by_type, modes, titles, page),
        *_reasons(entries, titles),
    ]
    return "\n".join(lines) + "\n"


def _header(modes: Sequence[str], page: Page) -> list[str]:
    return [
        f"# {page.title}",
        "",
        f"Written by {page.command}, not by hand; modes of this run: {', '.join(modes)}.",
        f"Shardwright {__version__}, torch {torch.__version__}, transformers {transformers.__version__}, float32, gloo "
        "ranks on one machine.",
        "",
        *page.text,
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


def _table(
    by_type: Mapping[str, Mapping[str, Entry]], modes: Sequence[str], titles: Mapping[str, str], page: Page
) -> list[str]:
    columns = ["type", "inputs", *(("plan", page.share[0]) if page.share else ()), *(titles[mode] for mode in modes)]
    lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    for model_type, row in sorted(by_type.items()):
        ran = next((entry for entry in row.values() if entry.plan_source), None)
        plan = (ran.plan_source, f"{getattr(ran, page.share[1]):.0%}") if ran and page.share else ("", "")
        cells = [_cell(row[mode]) if mode in row else "" for mode in modes]
        line = [model_type, ran.inputs if ran else "", *(plan if page.share else ()), *cells]
        lines.append(f"| {' | '.join(line)} |")
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
