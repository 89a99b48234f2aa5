"""What ``shardwright verify`` does and prints."""

from __future__ import annotations

import json

from rich.console import Console
from rich.table import Table

from shardwright.distributed.config import ParallelConfig
from shardwright.errors import ConfigError
from shardwright.verify.compare import EXACT, Report
from shardwright.verify.public import verify


def verify_command(model: str, config: ParallelConfig, accumulate: int, as_json: bool, device: str) -> int:
    """Verify ``model`` and print the report; returns the exit code: 0 if exact, else 1.

    Raises:
        ShardwrightError: bad input, or a plan that refuses; the message is for the user.
    """
    if accumulate < 1:
        raise ConfigError(f"accumulate is {accumulate}; it must be a whole number >= 1.")
    report = verify(model, config, accumulate=accumulate, device=device)
    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        _show(model, report, Console())
    return 0 if report.exact else 1


def _experts(report: Report) -> list[tuple[str, float, str]]:
    kinds = {"- of experts": report.expert_grad_rel_err, "- of routers": report.router_grad_rel_err}
    return [(what, error, "") for what, error in kinds.items() if error is not None]


def _show(model: str, report: Report, console: Console) -> None:
    table = Table(title=f"{model} on {report.world_size} ranks against one process", title_justify="left")
    table.add_column("compared")
    table.add_column("relative error", justify="right")
    table.add_column("largest at")
    rows = (
        ("loss (absolute)", report.loss_diff, ""),
        ("logits", report.logits_rel_err, ""),
        ("gradients", report.max_grad_rel_err, report.worst_parameter),
        *_experts(report),
        ("clipped norm", report.grad_norm_rel_err, ""),
        ("parameters after AdamW", report.parameter_rel_err, report.worst_updated_parameter),
    )
    for what, error, where in rows:
        table.add_row(what, f"{error:.1e}", where, style=None if error < EXACT else "red")
    if report.first_module is not None:
        name, error = report.first_module
        table.add_section()
        table.add_row(f"first to differ in {report.first_in}", f"{error:.1e}", name, style="red")
    console.print(table)
    for problem in report.problems:
        console.print(f"[red]{problem}[/red]")
    console.print(
        f"plan: {report.plan_source}; tensor parallelism splits {report.sharded_fraction:.0%} of the matrices"
    )
    if report.spread_fraction:
        console.print(f"experts on ranks of their own: {report.spread_fraction:.0%} of the parameters")
    if report.exact and report.precision != "float32":
        console.print("This model amplifies float32 rounding beyond 1e-5; the numbers are from a run in float64.")
    console.print("[green]exact[/green]" if report.exact else "[red]NOT exact[/red]")
