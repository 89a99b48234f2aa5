"""On how many architectures is each library's tensor parallelism exact?

Every causal-LM type of the installed transformers is shrunk to a tiny model, written to a folder, and trained for one
step by each contender: in one process, with the contender's own version of transformers, and on two gloo ranks with its
tensor parallelism. Compared are the loss and the gradient of every parameter. Takes about half an hour on two cores;
``--types llama,qwen3`` takes some only.
"""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from harness.contenders import AUTOMODEL, BENCHMARKS, OURS, TRANSFORMERS, Contender, ContenderError, Peer
from harness.layouts import Layout
from harness.machine import versions
from harness.results import Results, Table, arguments
from report import render

CONTENDERS = (OURS, TRANSFORMERS, AUTOMODEL)
TP = 2
EXACT = 1e-4  # relative; mistakes of sharding are orders of magnitude larger
FLOOR = 1e-3  # of the median gradient: gradients that are zero in exact arithmetic hold only rounding
SHARDED = 0.01  # of the elements of matrices: below, nothing was sharded
OUTCOMES = ("exact", "exact, not sharded", "silently wrong", "refused", "crashed", "absent")
TIME_LIMIT = 60.0  # seconds for one type and contender


class Attempt:
    """Holds the error that ends a block, if one does."""

    error: BaseException | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> bool:
        self.error = error
        return True


def make(model_type: str, folder: str) -> dict[str, Any]:
    """In one process of ours: write a tiny checkpoint of the type; the ids of its batch, or why there is none."""
    import torch
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    from shardwright.distributed.models.build import load_config
    from shardwright.verify.tiny import randomize, shrunk_config, text_batch

    attempt, ids = Attempt(), text_batch(0)["input_ids"]
    with attempt:
        config = shrunk_config(load_config(model_type), TP)
        torch.manual_seed(0)
        model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._from_config(config, dtype=torch.float32)
        randomize(model)
        model.train()(input_ids=ids, labels=ids).loss.backward()
        model.save_pretrained(folder)
    return {"ids": ids.tolist(), "error": "" if attempt.error is None else say(attempt.error)}


def compare(peer: str, folder: str, ids: list[list[int]]) -> dict[str, Any]:
    """On a rank: outcome and reason of one contender with the model in ``folder``."""
    import torch
    from transformers import AutoModelForCausalLM

    batch = {"input_ids": torch.tensor(ids), "labels": torch.tensor(ids)}
    known, built, ran = Attempt(), Attempt(), Attempt()
    with known:
        reference = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").train()
        loss = reference(**batch).loss
        loss.backward()
    if known.error is not None:
        return {"outcome": "absent", "reason": say(known.error), "versions": versions()}
    with built:
        sharded = import_module(f"harness.peers.{peer}").build(folder, Layout(tp=TP))
    if built.error is not None:
        return {"outcome": "refused", "reason": say(built.error), "versions": versions()}
    with ran:
        mine = sharded.backward(batch)
        errors = {"loss": relative_error(mine, loss.detach(), 0.0), **gradient_errors(sharded.model, reference)}
        share = sharded_share(sharded.model)
    if ran.error is not None:
        return {"outcome": "crashed", "reason": say(ran.error), "versions": versions()}
    worst = max(errors, key=lambda name: errors[name])
    outcome = "exact" if share >= SHARDED else "exact, not sharded"
    if errors[worst] >= EXACT:
        outcome = "silently wrong"
    reason = f"{worst} off by {errors[worst]:.1e}" if errors[worst] >= EXACT else ""
    return {"outcome": outcome, "reason": reason, "share": share, "versions": versions()}


def gradient_errors(model: Any, reference: Any) -> dict[str, float]:
    """By parameter name; infinite where the two models do not have the same parameters."""
    from torch.distributed.tensor import DTensor

    mine = dict(model.named_parameters())
    theirs = dict(reference.named_parameters())
    if mine.keys() != theirs.keys():
        return {f"parameters {sorted(mine.keys() ^ theirs.keys())[:3]}": math.inf}
    sizes = sorted(float(each.grad.abs().max()) for each in theirs.values() if each.grad is not None)
    floor = FLOOR * sizes[len(sizes) // 2]
    errors = {}
    for name, parameter in theirs.items():
        gradient = mine[name].grad
        if gradient is None or parameter.grad is None:
            other = gradient if parameter.grad is None else parameter.grad
            errors[name] = 0.0 if other is None or not bool(whole(other).any()) else math.inf
            continue
        found = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        errors[name] = relative_error(found, parameter.grad, floor)
    return errors


def whole(tensor: Any) -> Any:
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def relative_error(value: Any, expected: Any, floor: float) -> float:
    value = whole(value)
    if value.shape != expected.shape:
        return math.inf
    difference = float((value.double() - expected.double()).abs().max())
    scale = max(float(expected.abs().max()), floor)
    error = difference / scale if scale else math.inf if difference else 0.0
    return math.inf if math.isnan(error) else error


def sharded_share(model: Any) -> float:
    """Of the elements of matrices, those that the ``tp`` axis splits."""
    from torch.distributed.tensor import DTensor

    total = split = 0
    for parameter in model.parameters():
        if parameter.ndim < 2:
            continue
        total += parameter.numel()
        if isinstance(parameter, DTensor) and "tp" in (parameter.device_mesh.mesh_dim_names or ()):
            axis = parameter.device_mesh.mesh_dim_names.index("tp")
            split += 0 if parameter.placements[axis].is_replicate() else parameter.numel()
    return split / total if total else 0.0


def say(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def examine(peer: Peer, folders: Mapping[str, tuple[str, list[list[int]]]]) -> dict[str, dict[str, Any]]:
    """Every type with one contender; ranks that die or hang count as crashed and start anew."""
    found = {}
    with Contender(peer, TP, timeout=TIME_LIMIT) as contender:
        for model_type, (folder, ids) in folders.items():
            try:
                answers = contender.call("zoo_comparison:compare", peer=peer.name, folder=folder, ids=ids)
            except ContenderError as error:
                found[model_type] = {"outcome": "crashed", "reason": str(error), "versions": {}}
            else:  # the worst of what the ranks found
                order = ("exact", "exact, not sharded", "absent", "refused", "crashed", "silently wrong")
                found[model_type] = max(answers, key=lambda answer: order.index(answer["outcome"]))
            print(f"{peer.title:14} {model_type:28} {found[model_type]['outcome']}", flush=True)
    return found


def make_all(types: Sequence[str], scratch: Path, results: Results) -> dict[str, tuple[str, list[list[int]]]]:
    """The folder and ids of each type that can be built and run in one process."""
    folders, failed = {}, []
    with Contender(OURS, backend="none", timeout=TIME_LIMIT) as maker:
        for model_type in types:
            folder = str(scratch / model_type)
            try:
                made = maker.call("zoo_comparison:make", model_type=model_type, folder=folder)[0]
            except ContenderError as error:
                made = {"error": str(error)}
            if made["error"]:
                failed.append(model_type)
            else:
                folders[model_type] = (folder, made["ids"])
    if failed:
        results.notes.append(f"No tiny model that runs in one process: {', '.join(failed)}.")
    return folders


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--types", default="", help="Comma-separated; all causal-LM types without it.")
    parser.add_argument("--output", type=Path, default=BENCHMARKS / "RESULTS-ZOO.md")
    options = parser.parse_args()
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    types = [name for name in options.types.split(",") if name] or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    results = Results(
        "zoo_comparison",
        f"Exactness of tensor parallelism over {len(types)} causal-LM types",
        f"Tiny models, TP {TP} on gloo ranks, float32: loss and every gradient of one step against one process; exact "
        f"below {EXACT:g}. Refused: an error while sharding. Crashed: an error, death or hang afterwards. Absent: the "
        "contender's version of transformers does not run the type. Automodel's own recipes add calls after backward "
        "that repair part of what is wrong here; this is its parallelizer alone, with its recipes' loss.",
    )
    with tempfile.TemporaryDirectory(prefix="bench-zoo-") as scratch:
        folders = make_all(types[:8] if options.quick else types, Path(scratch), results)
        with ThreadPoolExecutor(2) as threads:
            found = dict(zip(CONTENDERS, threads.map(lambda peer: examine(peer, folders), CONTENDERS), strict=True))
    tabulate(found, results)
    results.write()
    options.output.write_text(render({"zoo_comparison": asdict(results)}, "Exactness over the zoo, against the peers"))


def tabulate(found: dict[Peer, dict[str, dict[str, Any]]], results: Results) -> None:
    counts = Table("Types", ["contender", *OUTCOMES])
    each = Table("Every type", ["type", *(peer.title for peer in CONTENDERS)])
    for peer, by_type in found.items():
        number = Counter(row["outcome"] for row in by_type.values())
        counts.rows.append([peer.title, *(number[outcome] for outcome in OUTCOMES)])
        for row in by_type.values():
            results.versions.setdefault(peer.title, {}).update(row["versions"])
    for model_type in found[OURS]:
        cells = []
        for peer in CONTENDERS:
            row = found[peer][model_type]
            cells.append(row["outcome"] if not row["reason"] else f"{row['outcome']}: {row['reason'][:120]}")
        each.rows.append([model_type, *cells])
    results.tables += [counts, each]
    wrong = [name for name, row in found[OURS].items() if row["outcome"] == "silently wrong"]
    results.goal("no type silently wrong", ", ".join(wrong) or "none", not wrong)


if __name__ == "__main__":
    main()
