"""Sentences and cells about estimates, for the terminal and for pages."""

from __future__ import annotations

from collections.abc import Iterable

from shardwright.distributed.config import ParallelConfig
from shardwright.estimate.changes import Change
from shardwright.estimate.estimating import Estimate, largest_parts
from shardwright.estimate.search import OBJECTIVES

NAMES = {
    "parameters": "parameters",
    "optimizer": "optimizer state",
    "gradients": "gradients",
    "gathered": "gathered parameters (FSDP2)",
    "buffers": "buffers of gathers and reductions",
    "unreduced": "gradients not reduced yet",
    "activations": "activations kept for backward",
    "working": "of the code that runs at that moment",
}


def answer(found: Estimate, change: Change | None) -> list[str]:
    """Whether it fits and by how much, how fast it is and what it waits for, and what to change: a line each."""
    device, speed = found.machine.device, found.speed
    needs = f"{gib(found.memory)} of {gib(device.memory)} GiB on each {device.name}"
    name, share = speed.waits_for
    return [
        f"[bold green]Yes, it fits[/]: {needs}, {gib(found.free)} GiB free."
        if found.fits
        else f"[bold red]No, it does not fit[/]: {needs}, {gib(-found.free)} GiB too much.",
        f"A step takes about [bold]{speed.step:.3g} s[/]: {speed.tokens_per_second:,.0f} tokens/s on each GPU, MFU "
        f"{speed.mfu:.1%}. Beside computation it waits for {name} most: {share:.1%} of a step.",
        f"To change: {told_change(found, change)}",
    ]


def told_change(found: Estimate, change: Change | None) -> str:
    """One sentence about what is better."""
    if change is None:
        return (
            "none of the settings next to these is faster and fits; shardwright suggest searches all layouts."
            if found.fits
            else "no setting that was tried needs less memory. Take more GPUs or shorter sequences."
        )
    made = change.made
    speed = made.speed.tokens_per_second / found.speed.tokens_per_second - 1
    size = f"{gib(made.memory)} GiB"
    if found.fits:
        return f"{change.words} is {speed:.0%} faster, and takes {size}."
    if made.fits:
        return f"it fits with {change.words}: {size}, {made.speed.tokens_per_second:,.0f} tokens/s on each GPU."
    return f"{change.words} brings it to {size}, which is not enough. Take more GPUs or shorter sequences."


def subject_line(found: Estimate) -> str:
    """The model, the layout and the work."""
    work = found.workload
    return (
        f"{found.model}, {found.parameters / 1e9:.2f} billion parameters, on {found.config.least_world_size} ranks: "
        f"{layout_of(found.config)}; {work.batch_size} x {work.seq_len} tokens a micro-batch"
        + (f", {work.accumulation} a step" if work.accumulation > 1 else "")
        + f"; {work.optimizer}."
    )


def next_better(better: Estimate, best: Estimate, objective: str) -> str:
    """What would have to change for a layout that would be better than the first, and does not fit."""
    gain = OBJECTIVES[objective](best) / OBJECTIVES[objective](better) - 1
    name, size = largest_parts(better.peak.parts)[0]
    means = {"speed": "faster", "memory": "smaller", "cost": "cheaper"}[objective]
    return (
        f"To change: {layout_of(better.config)}, {better.workload.batch_size} x {better.workload.accumulation}, would "
        f"be {gain:.0%} {means}, but lacks {gib(-better.free)} GiB on each GPU. At its peak, {better.peak.phase} of "
        f"{better.peak.where or 'what is outside of the blocks'}, {gib(size)} GiB are {NAMES[name]}."
    )


_SHORT = {"dp_replicate": "replicas", "dp_shard": "shards", "cp": "cp", "tp": "tp", "ep": "ep"}


def table_rows(fitting: Iterable[Estimate]) -> list[tuple[str, ...]]:
    """Ranks, recomputation, batch, what costs the place, tokens a second, MFU, GiB: of each layout."""
    made = list(fitting)
    return [
        (
            ranks_of(each.config), each.config.activation_checkpointing,
            f"{each.workload.batch_size} x {each.workload.accumulation}", against(each, made[0]),
            f"{each.speed.tokens_per_second:,.0f}", f"{each.speed.mfu:.1%}", f"{each.memory / 2**30:.1f}",
        )
        for each in made
    ]  # fmt: skip


def ranks_of(config: ParallelConfig) -> str:
    """The degrees above one, in few words."""
    degrees = config.to_dict()
    kept = ["kept gathered"] if config.reshard_after_forward == "never" else []
    return (
        ", ".join([*(f"{short} {degrees[name]}" for name, short in _SHORT.items() if degrees[name] > 1), *kept])
        or "one"
    )


def against(made: Estimate, best: Estimate) -> str:
    """What costs a layout its place: the part of a step that is longer by most."""
    if made is best:
        return "the first"
    parts = {
        "compute": made.speed.compute - best.speed.compute,
        "collectives": sum(made.speed.collectives.values()) - sum(best.speed.collectives.values()),
        "FSDP2": made.speed.exposed - best.speed.exposed,
        "optimizer": made.speed.optimizer - best.speed.optimizer,
    }
    name = max(parts, key=lambda key: parts[key])
    if parts[name] <= 0:
        return f"{made.speed.step - best.speed.step:+.2g} s"
    return f"+{parts[name]:.2g} s {name}"


_DEGREES = ("dp_replicate", "dp_shard", "cp", "tp", "ep")


def layout_of(config: ParallelConfig) -> str:
    """The degrees above one, and the settings that are not the usual ones."""
    usual, values = ParallelConfig().to_dict(), config.to_dict()
    degrees = [f"{name} {values[name]}" for name in _DEGREES if values[name] > 1]
    others = [
        f"{key}={value}" for key, value in values.items() if value != usual[key] and key not in (*_DEGREES, "precision")
    ]
    return ", ".join([*degrees, *others]) or "one rank"


def gib(size: float) -> str:
    """Bytes in GiB, as text."""
    return f"{size / 2**30:.2f}"
