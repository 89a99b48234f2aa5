"""How many bytes does a rank keep between forward and backward, with sequence and loss parallelism and checkpointing?

Two real gloo ranks; the tensors that autograd saves are counted, each storage once, parameters left out. The formula:
with every block recomputed, a rank keeps of a block its input alone, and with sequence parallelism 1/tp of that; logits
(and what the loss saves of them) are 1/tp of the vocabulary.
"""

from __future__ import annotations

import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

from harness.contenders import AUTOMODEL, HANDWRITTEN, OURS, TRANSFORMERS, Contender, Peer, nurseries
from harness.layouts import Layout
from harness.machine import versions
from harness.results import Results, Table, arguments
from harness.shapes import batch_of, write_checkpoint

TP, ROWS, LENGTH, DEPTHS = 2, 2, 64, (2, 4)
SIZES = {"hidden_size": 128, "intermediate_size": 384, "vocab_size": 8192}
WIDTH, VOCABULARY = SIZES["hidden_size"], SIZES["vocab_size"]
CONTENDERS = (OURS, HANDWRITTEN, TRANSFORMERS, AUTOMODEL)
LAYOUTS = {
    "TP 2": Layout(tp=TP),
    "TP 2 + SP": Layout(tp=TP, sequence_parallel=True),
    "TP 2 + checkpointing": Layout(tp=TP, activation_checkpointing=True),
    "TP 2 + SP + checkpointing": Layout(tp=TP, sequence_parallel=True, activation_checkpointing=True),
}
TOLERANCE = 1.02  # the formula counts tensors of the size of the stream; norms save a number per token besides


def saved(peer: str, folder: str, layout: dict[str, Any]) -> dict[str, Any]:
    """On a rank: bytes that autograd keeps after the forward, and the largest tensor that carries the vocabulary."""
    from harness.saved_tensors import SavedTensors

    sharded = import_module(f"harness.peers.{peer}").build(folder, Layout(**layout))
    batch = batch_of(ROWS, LENGTH, VOCABULARY, seed=0)
    sharded.backward(batch)
    sharded.model.zero_grad()
    with SavedTensors(sharded.model) as tensors:
        sharded.backward(batch)
    return {
        "bytes": tensors.bytes,
        "widest": tensors.widest(ROWS * (LENGTH - 1) * VOCABULARY // TP),
        "versions": versions(),
    }


def measure(contender: Contender, title: str, folders: dict[int, Path], results: Results) -> dict[str, float] | None:
    """(bytes per block, share of the vocabulary in the largest tensor) of one contender, or None if it cannot run."""
    found = {}
    with results.failures_of(f"{contender.peer.title}, {title}"):
        for depth, folder in folders.items():
            asked = {"peer": contender.peer.name, "folder": str(folder), "layout": vars(LAYOUTS[title])}
            found[depth] = contender.call("activation_memory:saved", **asked)[0]
            results.versions[contender.peer.title] = found[depth]["versions"]
        few, many = (found[depth] for depth in DEPTHS)
        per_block = (many["bytes"] - few["bytes"]) / (DEPTHS[1] - DEPTHS[0])
        return {"block": per_block, "rest": few["bytes"] - DEPTHS[0] * per_block, "logits": many["widest"]}
    return None


def main() -> None:
    arguments(__doc__).parse_args()
    results = Results(
        "activation_memory",
        "Activation memory per rank",
        f"Bytes that autograd saves on rank 0 of {TP} gloo ranks, each storage once, without parameters, "
        f"Llama, {ROWS} x {LENGTH} tokens, float32; per block: difference between {DEPTHS[1]} and {DEPTHS[0]} blocks. "
        "In units of the whole residual stream. Logits: elements of the largest saved tensor, relative to tokens x "
        "vocabulary.",
    )
    found: dict[tuple[str, Peer], Any] = {}
    with tempfile.TemporaryDirectory(prefix="bench-memory-") as scratch, nurseries(CONTENDERS) as forks:
        folders = {depth: Path(scratch) / str(depth) for depth in DEPTHS}
        for depth, folder in folders.items():
            write_checkpoint(folder, "llama", num_hidden_layers=depth, **SIZES)
        for peer in CONTENDERS:
            with Contender(peer, TP, nursery=forks.get(peer)) as contender:
                for title in LAYOUTS:
                    found[title, peer] = measure(contender, title, folders, results)
    stream = ROWS * LENGTH * WIDTH * 4
    table = Table("Per rank", ["layout", "contender", "per block", "outside of blocks", "logits"])
    for (title, peer), row in sorted(found.items(), key=lambda item: list(LAYOUTS).index(item[0][0])):
        numbers = ["could not run", "", ""] if row is None else _numbers(row, stream)
        table.rows.append([title, peer.title, *numbers])
    results.tables.append(table)
    judge(found, stream, results)
    results.write()


def _numbers(row: dict[str, float], stream: int) -> list[str]:
    logits = row["logits"] / (ROWS * LENGTH * VOCABULARY)
    return [f"{row['block'] / stream:.2f}", f"{row['rest'] / stream:.2f}", f"{logits:.2f}"]


def judge(found: dict[tuple[str, Peer], Any], stream: int, results: Results) -> None:
    for title, share in (("TP 2 + checkpointing", 1.0), ("TP 2 + SP + checkpointing", 1 / TP)):
        row = found[title, OURS]
        text = f"{title}: a block keeps {share:g} of the stream"
        if row is None:
            results.goal(text, "could not run", None)
            continue
        results.goal(text, f"{row['block'] / stream:.2f}", row["block"] <= TOLERANCE * share * stream)
    for title in LAYOUTS:
        row = found[title, OURS]
        if row is not None:
            logits = row["logits"] / (ROWS * LENGTH * VOCABULARY)
            results.goal(f"{title}: no saved tensor above 1/tp of the logits", f"{logits:.2f}", logits <= 1 / TP)


if __name__ == "__main__":
    main()
