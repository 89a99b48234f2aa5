"""How many collectives, and how many bytes, does tensor parallelism cost per decoder layer and training step?

Two real gloo ranks, one training step (forward, backward, AdamW) of a tiny model. Per layer: the difference between
four layers and two, halved. What does not change with the length of the sequence is a sum of gradients of
replicated parameters.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

from harness.contenders import AUTOMODEL, HANDWRITTEN, OURS, TRANSFORMERS, Contender, Peer, nurseries
from harness.layouts import Layout
from harness.machine import versions
from harness.results import Results, Table, arguments
from harness.shapes import FAMILIES, TINY, batch_of, write_checkpoint

ROWS, LENGTHS, DEPTHS, TP = 2, (16, 32), (2, 4), 2
Found = dict[tuple[str, Peer, Layout], dict[str, Any] | None]
CONTENDERS = (OURS, HANDWRITTEN, TRANSFORMERS, AUTOMODEL)


def count(peer: str, folder: str, layout: dict[str, Any]) -> dict[str, Any]:
    """On a rank: the collectives of one step, at two lengths."""
    import torch
    from harness.counting import CollectiveCounter

    sharded = import_module(f"harness.peers.{peer}").build(folder, Layout(**layout))
    optimizer = torch.optim.AdamW(sharded.model.parameters(), lr=0.0)  # some leave their sums to it
    runs, losses = [], []
    for length in LENGTHS:
        batch = batch_of(ROWS, length, TINY["vocab_size"], seed=0)
        sharded.backward(batch)  # the first step may do what no other does
        sharded.model.zero_grad()
        with CollectiveCounter() as counter:
            losses.append(float(sharded.backward(batch)))
            optimizer.step()
        sharded.model.zero_grad()
        runs.append(counter.calls)
    return {"calls": runs, "losses": losses, "versions": versions()}


def split(runs: list[list[list[Any]]]) -> tuple[Counter[str], float, int]:
    """(activations' collectives by kind, the bytes they send, collectives of parameters' gradients) of one step."""
    short, long = runs
    if [kind for kind, _ in short] != [kind for kind, _ in long]:
        raise ValueError("The collectives of a step depend on the length of the sequence.")
    moving = [(kind, sent) for (kind, sent), (_, longer) in zip(short, long, strict=True) if sent != longer]
    return Counter(kind for kind, _ in moving), sum(sent for _, sent in moving), len(short) - len(moving)


def minimum_bytes() -> float:
    """What each rank has to send per layer and step: four sums of the residual stream, float32."""
    stream = ROWS * LENGTHS[0] * TINY["hidden_size"] * 4
    return 4 * 2 * stream * (TP - 1) / TP


def measure(contender: Contender, family: str, layout: Layout, folders: dict[int, Path], results: Results) -> Any:
    """Per-layer figures of one contender, or None if it cannot run."""
    steps, losses = {}, {}
    title = contender.peer.title
    with results.failures_of(f"{title}, {family}, {layout.title}"):
        for depth, folder in folders.items():
            arguments = {"peer": contender.peer.name, "folder": str(folder), "layout": vars(layout)}
            found = contender.call("collectives:count", **arguments)[0]
            steps[depth], losses[depth] = split(found["calls"]), found["losses"][0]
            results.versions[title] = found["versions"]
        few, many = (steps[depth] for depth in DEPTHS)
        apart = DEPTHS[1] - DEPTHS[0]
        kinds = {kind: (many[0][kind] - few[0][kind]) / apart for kind in many[0]}
        return {
            "calls": sum(kinds.values()),
            "kinds": ", ".join(f"{number:g} {kind}" for kind, number in sorted(kinds.items()) if number),
            "bytes": (many[1] - few[1]) / apart,
            "gradients": (many[2] - few[2]) / apart,
            "gradients_in_all": many[2],
            "loss": losses[DEPTHS[1]],
        }
    return None


def main() -> None:
    arguments(__doc__).parse_args()
    results = Results(
        "collectives",
        "Tensor-parallel collectives and bytes per decoder layer and training step",
        f"Counted on {TP} real gloo ranks by a dispatch mode below DTensor: difference between {DEPTHS[1]} and "
        f"{DEPTHS[0]} layers, per layer. Bytes: what a rank sends in a ring, relative to the formula's minimum of four "
        "all-reduces of the residual stream. Gradient sums: collectives whose size does not depend on the tokens.",
    )
    layouts = [Layout(tp=TP), Layout(tp=TP, sequence_parallel=True)]
    found: Found = {}
    with tempfile.TemporaryDirectory(prefix="bench-collectives-") as scratch, nurseries(CONTENDERS) as forks:
        folders = {(family, depth): Path(scratch) / f"{family}-{depth}" for family in FAMILIES for depth in DEPTHS}
        for (family, depth), folder in folders.items():
            write_checkpoint(folder, family, num_hidden_layers=depth)

        def examine(peer: Peer) -> None:
            with Contender(peer, TP, nursery=forks.get(peer)) as contender:
                for layout in layouts:
                    for family in FAMILIES:
                        mine = {depth: folders[family, depth] for depth in DEPTHS}
                        found[family, peer, layout] = measure(contender, family, layout, mine, results)

        with ThreadPoolExecutor(2) as threads:  # nothing is timed here
            list(threads.map(examine, CONTENDERS))
    results.tables = [tabulate(found, layout) for layout in layouts]
    judge(found, layouts[0], results)
    results.write()


def tabulate(found: Found, layout: Layout) -> Table:
    columns = ["shape", "contender", "collectives per layer", "kinds", "bytes / minimum"]
    columns += ["gradient sums per layer", "gradient sums per step (4 layers)", "loss"]
    table = Table(layout.title, columns)
    for family in FAMILIES:
        for peer in CONTENDERS:
            row = found[family, peer, layout]
            if row is None:
                table.rows.append([family, peer.title, "could not run", *[""] * 5])
                continue
            numbers = [f"{row['calls']:g}", row["kinds"], f"{row['bytes'] / minimum_bytes():.2f}"]
            sums = [f"{row['gradients']:g}", row["gradients_in_all"]]
            table.rows.append([family, peer.title, *numbers, *sums, f"{row['loss']:.5f}"])
    return table


def judge(found: Found, layout: Layout, results: Results) -> None:
    for family in FAMILIES:
        row = found[family, OURS, layout]
        if row is None:
            results.goal(f"{family}: 4 collectives per layer, minimal bytes", "could not run", None)
            continue
        relative = row["bytes"] / minimum_bytes()
        dense = family != "mixtral"
        text = "4 collectives per dense layer, bytes = minimum" if dense else "4 collectives and the router's"
        measured = f"{row['calls']:g} collectives, {relative:.2f} of the minimum"
        reached = row["calls"] == 4 and relative == 1.0 if dense else row["calls"] <= 5
        results.goal(f"{family}: {text}", measured, reached)
        sums = row["gradients_in_all"]
        results.goal(f"{family}: at most 2 gradient sums per step", f"{sums}", sums <= 2)


if __name__ == "__main__":
    main()
