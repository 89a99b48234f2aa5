"""The zoo: ``verify`` over every causal-LM and image-text-to-text type of the installed transformers.

python -m shardwright.verify.zoo [--experts | --context] [--types a,b,c] [--modes tp2,...] [--output PAGE] [--json FILE]
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import click
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from shardwright.distributed.config import ParallelConfig
from shardwright.distributed.planning.tensor import plan_and_resolve
from shardwright.distributed.replay.reading import ModelReading
from shardwright.errors import ConfigError, ShardwrightError
from shardwright.verify.page import ARCHITECTURES, CONTEXT_PAGE, EXPERTS_PAGE, write_page
from shardwright.verify.public import case_of, run
from shardwright.verify.ranks import RankError, RankPool
from shardwright.verify.run import Case
from shardwright.verify.source import load_config
from shardwright.verify.stages import CrashError, ShrinkError, Stage


@dataclass(frozen=True)
class Mode:
    """A way to spread every model of the zoo."""

    config: ParallelConfig
    accumulate: int
    title: str


_TP2 = ParallelConfig(tp=2, dp_shard=1)
MODES = {
    "tp2": Mode(_TP2, 1, "TP 2"),
    "tp2_sp": Mode(_TP2.with_(sequence_parallel=True), 1, "TP 2 + SP"),
    "fsdp2_tp2": Mode(_TP2.with_(dp_shard=2), 2, "FSDP 2 x TP 2"),
    "fsdp2_tp2_sp": Mode(_TP2.with_(dp_shard=2, sequence_parallel=True), 2, "FSDP 2 x TP 2 + SP"),
}


_EP2 = ParallelConfig(dp_shard=2, ep=2)
_TP2_EP2 = ParallelConfig(dp_shard=1, tp=2, ep=2, sequence_parallel=True)
# For types with experts.
EXPERT_MODES = {
    "ep2": Mode(_EP2, 1, "EP 2"),
    "ep2_over_tp2_sp": Mode(_TP2_EP2, 1, "EP 2 over TP 2 + SP"),
    "fsdp2_tp2_ep2": Mode(_TP2_EP2.with_(dp_shard=2), 2, "EP 2 in FSDP 2 x TP 2 + SP"),
    "fsdp2_tp2_ep4": Mode(_TP2_EP2.with_(dp_shard=2, ep=4), 2, "EP 4 over FSDP 2 x TP 2 + SP"),
}
_CP2 = ParallelConfig(cp=2, dp_shard=1)
# With long sequences split.
CONTEXT_MODES = {
    "cp2": Mode(_CP2, 1, "CP 2"),
    "cp2_tp2": Mode(_CP2.with_(tp=2), 1, "CP 2 x TP 2"),
    "cp2_tp2_sp": Mode(_CP2.with_(tp=2, sequence_parallel=True), 1, "CP 2 x TP 2 + SP"),
    "fsdp2_cp2": Mode(_CP2.with_(dp_shard=2), 2, "FSDP 2 x CP 2"),
}
EVERY_MODE = MODES | EXPERT_MODES | CONTEXT_MODES

TYPES_PER_POOL = 25
_EXPERT_COUNT = re.compile(r"(moe_)?(num|n)_(local_|routed_)?experts")


@dataclass
class Entry:
    """What became of one type in one mode.

    Attributes:
        outcome: ``exact``, ``wrong`` (it ran and computed something else), ``crashed`` (it runs in one process only),
            ``refused`` (before the first collective, with a reason) or ``not built`` (no tiny copy that runs in one
            process).
        reason: one sentence for anything but ``exact``.
    """

    type: str
    mode: str
    outcome: str
    reason: str = ""
    plan_source: str = ""
    sharded_fraction: float = 0.0
    inputs: str = ""
    worst_error: float = 0.0
    seconds: float = 0.0
    spread_fraction: float = 0.0


def all_types() -> list[str]:
    """Every causal-LM and image-text-to-text type of the installed transformers."""
    return sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES})


def types_with_experts() -> list[str]:
    """Those among them whose config states several experts, as far as they have a config by themselves."""
    found = []
    for model_type in all_types():
        with contextlib.suppress(ConfigError):
            if _has_experts(load_config(model_type).to_dict()):
                found.append(model_type)
    return found


def _has_experts(config: Mapping[Any, Any]) -> bool:
    return any(
        (isinstance(value, dict) and _has_experts(value))
        or (isinstance(key, str) and bool(_EXPERT_COUNT.fullmatch(key)) and isinstance(value, int) and value > 1)
        for key, value in config.items()
    )


@lru_cache(maxsize=1)
def _case(model_type: str) -> Case:
    """The tiny model and its batches: the same in every mode, since all have the same tp."""
    try:
        return case_of(model_type, _TP2)
    except ConfigError as error:
        raise ShrinkError(str(error)) from error


def examine(model_type: str, mode_name: str, pool: RankPool, timeout: float = 90.0) -> Entry:
    """Verify one type in one mode; whatever happens to it becomes an entry."""
    mode, entry = EVERY_MODE[mode_name], Entry(model_type, mode_name, "exact")
    with _into(entry):
        report = run(replace(_case(model_type), config=mode.config, accumulate=mode.accumulate), pool, timeout=timeout)
        entry.plan_source, entry.sharded_fraction = report.plan_source, report.sharded_fraction
        entry.spread_fraction = report.spread_fraction
        entry.worst_error, entry.inputs = report.worst_error, report.inputs
        if not report.exact:
            entry.outcome, entry.reason = "wrong", report.summary()
    return entry


def plan_of(model_type: str) -> Entry:
    """Choose and resolve the plan of a type, with sequence parallelism, without ranks: a fraction of a second."""
    entry = Entry(model_type, "plan", "planned")
    with _into(entry):
        with Stage(ShrinkError, "The tiny model cannot be built"):
            model = _case(model_type).build()
        with Stage(CrashError, "Planning failed"):
            plan, _ = plan_and_resolve(ModelReading(model), None, 2, sequence_parallel=True)
        entry.plan_source = plan.source
    return entry


@contextlib.contextmanager
def _into(entry: Entry) -> Iterator[None]:
    """Note in ``entry`` how the block ended, and after how long."""
    started = time.monotonic()
    try:
        yield
    except ShrinkError as error:
        entry.outcome, entry.reason = "not built", str(error)
    except (CrashError, RankError) as error:
        entry.outcome, entry.reason = "crashed", str(error)
    except ShardwrightError as error:
        entry.outcome, entry.reason = "refused", str(error)
    entry.seconds = round(time.monotonic() - started, 2)


def examine_all(types: Iterable[str], modes: Sequence[str]) -> Iterator[Entry]:
    """Every type in every mode, one after the other, in two pools that live throughout."""
    with RankPool(2) as two, RankPool(4) as four:
        for number, model_type in enumerate(types, start=1):
            if number % TYPES_PER_POOL == 0:  # torch's caches of shapes and layouts only ever grow
                two.close()
                four.close()
            for mode in modes:
                pool = two if EVERY_MODE[mode].config.least_world_size == 2 else four
                entry = examine(model_type, mode, pool)
                yield entry
                if entry.outcome == "not built":  # it would fail the same way in every mode
                    break


@click.command()
@click.option("--types", default="", help="Comma-separated model types; all of transformers without it.")
@click.option("--modes", default="", help=f"Comma-separated: {', '.join(EVERY_MODE)}. Without it, all that apply.")
@click.option("--experts", is_flag=True, help="Only types with experts, in the modes of expert parallelism.")
@click.option("--context", is_flag=True, help="In the modes of context parallelism.")
@click.option("--output", type=click.Path(path_type=Path), help="Write the page (Markdown) here.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the entries (JSON) here.")
@click.option("--resume", is_flag=True, help="Go on with the run whose entries are in --json.")
@click.option("--plan-only", is_flag=True, help="Only choose and resolve every plan: no ranks, no numbers, no page.")
def main(
    types: str,
    modes: str,
    experts: bool,
    context: bool,
    output: Path | None,
    json_path: Path | None,
    resume: bool,
    plan_only: bool,
) -> None:
    """Verify every architecture of the installed transformers, in every mode. Exit code 1 if one is wrong."""
    chosen = [name for name in types.split(",") if name] or (types_with_experts() if experts else all_types())
    default, page = (
        (EXPERT_MODES, EXPERTS_PAGE)
        if experts
        else (CONTEXT_MODES, CONTEXT_PAGE)
        if context
        else (MODES, ARCHITECTURES)
    )
    chosen_modes = [name for name in modes.split(",") if name] or list(default)
    if unknown := sorted(set(chosen_modes) - set(EVERY_MODE)):
        raise click.UsageError(f"There is no mode {', '.join(unknown)}; there are {', '.join(EVERY_MODE)}.")
    if resume and json_path is None:
        raise click.UsageError("--resume needs the file of the earlier run: --json FILE.")
    entries = _finished(json_path, chosen_modes) if resume and json_path is not None else []
    known = {entry.type for entry in entries}
    new = [name for name in chosen if name not in known]
    for entry in map(plan_of, new) if plan_only else examine_all(new, chosen_modes):
        reason = " ".join(entry.reason.split())[:160]
        click.echo(f"{entry.type:30} {entry.mode:14} {entry.outcome:10} {entry.seconds:6.1f} s  {reason}")
        entries.append(entry)
        if json_path is not None:
            json_path.write_text(json.dumps([asdict(entry) for entry in entries], indent=1) + "\n")
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        titles = {name: mode.title for name, mode in EVERY_MODE.items()}
        output.write_text(write_page(entries, titles, page))
    counts = {
        outcome: sum(entry.outcome == outcome for entry in entries) for outcome in sorted({e.outcome for e in entries})
    }
    click.echo(", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    raise SystemExit(any(entry.outcome == "wrong" for entry in entries))


def _finished(path: Path, modes: Sequence[str]) -> list[Entry]:
    """The entries in a file of the types that have one for each mode, or cannot be built."""
    entries = [Entry(**entry) for entry in json.loads(path.read_text())] if path.exists() else []
    seen = {(entry.type, entry.mode) for entry in entries}
    unbuilt = {entry.type for entry in entries if entry.outcome == "not built"}
    return [e for e in entries if e.type in unbuilt or all((e.type, mode) in seen for mode in modes)]


if __name__ == "__main__":
    main()
