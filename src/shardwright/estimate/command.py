"""What ``shardwright plan`` does."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import click
from rich.console import Console

from shardwright.distributed.config import ParallelConfig
from shardwright.distributed.plan import ParallelPlan
from shardwright.errors import ConfigError
from shardwright.estimate.predict import predict, to_dict
from shardwright.estimate.report import print_report


def run(
    model: str, config: ParallelConfig, *, weights: str, save: Path | None, html: Path | None, as_json: bool
) -> None:
    """Predict, save the plan where asked to, print.

    Raises:
        ShardwrightError: as :func:`shardwright.estimate.predict.predict`, or ``save`` cannot be written.
    """
    prediction = predict(model, config, weights=weights)
    if save is not None:
        save_plan(prediction.plan, save)
    if html is not None:
        from shardwright.estimate.page.pages import plan_page

        html.write_text(plan_page(prediction), encoding="utf-8")
    if as_json:
        click.echo(json.dumps(to_dict(prediction), indent=2))
        return
    print_report(prediction, Console())
    if save is not None:
        click.echo(f"Plan saved to {save}: edit it, then pass it back with --plan {save}.")


def save_plan(plan: ParallelPlan, path: Path) -> None:
    """Write ``plan`` as YAML, whole or not at all.

    Raises:
        ConfigError: the file exists (it may have been edited by hand), or its folder cannot be written.
    """
    if path.exists():
        raise ConfigError(f"{path} exists. Choose another name for --save, or remove it first.")
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    source = plan.source if plan.source.startswith("saved: ") else f"saved: {plan.source}"
    try:
        partial.write_text(replace(plan, source=source).to_yaml())
        partial.replace(path)
    except OSError as error:
        raise ConfigError(f"The plan cannot be saved to {path}: {error.strerror}.") from error
    finally:
        partial.unlink(missing_ok=True)
