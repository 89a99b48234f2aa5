"""The command line. Every command imports what it needs when it is called, so ``shardwright --help`` is instant."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from shardwright import __version__
from shardwright.errors import ConfigError, RunError, ShardwrightError, StoppedError, from_system
from shardwright.untrusted import printable

_SECONDS_FOR_RANK_0 = 3
_LEAST_FILES = 64
_LEAST_MEMORY = 2**30
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class _SignalError(BaseException):
    """A signal that ends this process. No ``Exception``: what runs is not meant to catch it."""


class _Commands(click.Group):
    """A group that turns every :class:`ShardwrightError` into one paragraph on stderr and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        with _listening() as received:
            try:
                _require_limits()
                return super().invoke(ctx)
            except ShardwrightError as error:
                told = error
            except (KeyboardInterrupt, _SignalError):
                told = StoppedError("Stopped by SIGINT.")
            except Exception as error:
                refused = from_system(error)
                if refused is None and not received:
                    raise
                told = refused or RunError(str(error))
        # Compiled code that is interrupted while it is imported raises errors of its own instead of the signal's.
        told = StoppedError(f"Stopped by {received[0]}.") if received else told
        tell(told)
        ctx.exit(told.exit_code)


def _require_limits() -> None:
    """Raises ConfigError where torch could not even be imported, or would end the process without a word."""
    for limit, least, what in (
        (resource.RLIMIT_NOFILE, _LEAST_FILES, "files open at once (ulimit -n)"),
        (resource.RLIMIT_AS, _LEAST_MEMORY, "bytes of address space (ulimit -v)"),
    ):
        allowed = resource.getrlimit(limit)[0]
        if allowed != resource.RLIM_INFINITY and allowed < least:
            raise ConfigError(
                f"This process may have {allowed:,} {what}; at least {least:,} are needed. Raise the limit."
            )


@contextmanager
def _listening() -> Iterator[list[str]]:
    """Inside, a signal that would end this process without a word, and leave its folders behind, is raised as an error.

    Not in a rank that another launcher has started: it may be told to end while it waits in compiled code. Signals that
    this process was started to ignore, as by nohup, stay ignored.

    Yields:
        names of the signals that have come.
    """
    received: list[str] = []

    def stop(number: int, _: Any) -> None:
        received.append(signal.Signals(number).name)
        raise _SignalError

    started = not {"RANK", "SLURM_STEP_NUM_TASKS"} & os.environ.keys()
    before = {number: signal.getsignal(number) for number in _SIGNALS} if started else {}
    heard = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
    for number in heard:
        signal.signal(number, stop)
    try:
        yield received
    finally:
        for number, handler in heard.items():
            signal.signal(number, handler)


def tell(error: ShardwrightError) -> None:
    """Print the error, in one rank only: every rank has the same one."""
    from rich.console import Console
    from rich.text import Text

    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) != "0":
        time.sleep(_SECONDS_FOR_RANK_0)  # torchrun stops every rank when the first one ends
        return
    text = Text("Error: ", style="bold red").append(printable(str(error)), style="default")
    Console(stderr=True).print(text, soft_wrap=True)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Run any transformer sharded over many GPUs, and prove that it is the same function."""


@main.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def train(config: Path, overrides: tuple[str, ...]) -> None:
    """Train the model that the YAML file CONFIG describes.

    Any key can be set on the command line too, for example: steps=100 sharding.tp=2 optimizer.lr=1e-4.

    Starts as many local ranks as the config asks for, or uses those that torchrun or srun has started.
    """
    from shardwright.train.start import start

    start(config, overrides)


@main.command()
@click.argument("model")
@click.option("--tp", default=2, show_default=True, help="Tensor-parallel ranks.")
@click.option("--sequence-parallel", is_flag=True, help="Split the residual stream along the sequence over them.")
@click.option("--dp-shard", default=-1, help="Ranks that FSDP2 shards over; as few as possible by default.")
@click.option("--ep", default=1, show_default=True, help="Expert-parallel ranks, among the others.")
@click.option("--reshard-after-forward", type=click.Choice(["default", "always", "never"]), default="default",
              show_default=True, help="Which blocks FSDP2 frees after forward.")  # fmt: skip
@click.option("--keep-gathered-gib", default=0.0, help="GiB that blocks may take which it does not free.")
@click.option("--shard-ends", is_flag=True, help="Make embedding and head units of their own.")
@click.option("--plan", help="A plan to use: a YAML or JSON file, or a dotted path to a dict or function.")
@click.option("--precision", type=click.Choice(["float32", "bf16"]), default="bf16", show_default=True,
              help="What a step computes in.")  # fmt: skip
@click.option("--weights", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True,
              help="Dtype in which parameters, gradients and AdamW's state are kept.")  # fmt: skip
@click.option("--save", type=click.Path(path_type=Path), help="Write the plan to this YAML file: edit, then --plan it.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def plan(model: str, weights: str, save: Path | None, as_json: bool, **degrees: Any) -> None:
    """Show how MODEL would be cut, what stays on a rank, and what the ranks would send. Runs and downloads nothing.

    MODEL is a checkpoint folder, a config.json, or a model type of transformers such as qwen3.
    """
    from shardwright.distributed.config import ParallelConfig

    config = ParallelConfig(**degrees)

    from shardwright.estimate.command import run

    run(model, config, weights=weights, save=save, as_json=as_json)


@main.command()
@click.argument("model")
@click.argument("layout", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--gpus", required=True, type=click.IntRange(1), help="How many, one for each rank.")
@click.option("--gpu", required=True, help="A device, such as h100-80gb, or a YAML file that describes one.")
@click.option("--seq-len", required=True, type=int, help="Tokens of a sequence.")
@click.option("--batch-size", default=1, show_default=True, help="Sequences of a micro-batch, on each data-parallel "
              "rank.")  # fmt: skip
@click.option("--accumulation", default=1, show_default=True, help="Micro-batches of a step.")
@click.option("--optimizer", default="adamw", show_default=True, help="adamw, adamw_fused, adamw_8bit, adafactor, sgd, "
              "sgd_momentum, muon ...")  # fmt: skip
@click.option("--weights", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True,
              help="Dtype in which parameters, gradients and the optimizer's state are kept.")  # fmt: skip
@click.option("--lora", default=0, help="Rank of LoRA adapters on all linear layers; the rest is frozen.")
@click.option("--network", default="ib-ndr", show_default=True, help="The fabric between nodes.")
@click.option("--gpus-per-node", type=click.IntRange(1), help="Instead of what is usual for the device.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def estimate(
    model: str, layout: tuple[str, ...], seq_len: int, batch_size: int, accumulation: int, optimizer: str,
    **machine: Any,
) -> None:  # fmt: skip
    """Say whether training MODEL fits, and what it takes. Needs no GPU and no weights.

    MODEL is a checkpoint folder, a config.json, or a model type of transformers such as qwen3. KEY=VALUE is any setting
    of the sharding, for example tp=8 sequence_parallel=true activation_checkpointing=full. Weights are kept in float32
    and a step computes in bfloat16 unless --weights and precision=... say otherwise.
    """
    from shardwright.estimate.estimate_command import parse_layout, run
    from shardwright.estimate.workload import Workload

    workload = Workload(seq_len, batch_size, accumulation, optimizer)
    run(model, parse_layout(layout, {"precision": "bf16"}), workload, **machine)


@main.command()
@click.argument("model")
@click.option("--tp", default=1, show_default=True, help="Tensor-parallel ranks.")
@click.option("--dp-shard", default=-1, help="Ranks that the engine shards over; as few as possible by default.")
@click.option("--ep", default=1, show_default=True, help="Expert-parallel ranks, among the others.")
@click.option("--dp-replicate", default=1, show_default=True, help="Replicas of the sharded model (HSDP).")
@click.option("--sequence-parallel", is_flag=True, help="Split the residual stream along the sequence.")
@click.option("--activation-checkpointing", is_flag=True, help="Recompute every block in backward.")
@click.option("--engine", type=click.Choice(["fsdp2", "megatron_fsdp"]), default="fsdp2", show_default=True,
              help="What shards over the data-parallel ranks; megatron_fsdp needs a GPU for each rank.")  # fmt: skip
@click.option("--accumulate", default=1, show_default=True, help="Micro-batches per data-parallel rank.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True,
              help="What both sides compute on; ranks share GPUs where there are fewer.")  # fmt: skip
def verify(
    model: str, accumulate: int, as_json: bool, activation_checkpointing: bool, device: str, **degrees: Any
) -> None:
    """Prove that MODEL, sharded, computes what it computes in one process. Exit code 0 only if it is exact.

    MODEL is a checkpoint folder, a config.json, or a model type of transformers such as qwen3. A tiny copy of it is
    trained for one step on ranks of this machine (on the CPU, whatever GPUs there are, unless --device or --engine says
    otherwise); no weights are read or downloaded.
    """
    from shardwright.distributed.config import ParallelConfig

    config = ParallelConfig(activation_checkpointing="full" if activation_checkpointing else "none", **degrees)

    from shardwright.verify.cli import verify_command

    raise SystemExit(verify_command(model, config, accumulate, as_json, device))


@main.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--trust-remote-code", is_flag=True, help="Run the model's own code, which is in the checkpoint.")
@click.option("--overwrite", is_flag=True, help="Replace in OUT what Shardwright wrote there; all else stays.")
def export(checkpoint: Path, out: Path, trust_remote_code: bool, overwrite: bool) -> None:
    """Turn a training CHECKPOINT (or the newest of a run's folder) into a Hugging Face folder OUT. Needs no GPU."""
    from shardwright.checkpoint.run_info import find_checkpoint

    checkpoint = find_checkpoint(checkpoint)

    from shardwright.checkpoint.export import export as export_checkpoint

    export_checkpoint(checkpoint, out, trust_remote_code, overwrite)


@main.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--no-check", is_flag=True, help="Do not read all files to compare their checksums.")
def inspect(checkpoint: Path, no_check: bool) -> None:
    """Say what is in a training CHECKPOINT (or the newest one of a run's folder), and whether it is whole."""
    from shardwright.checkpoint.run_info import find_checkpoint

    checkpoint = find_checkpoint(checkpoint)  # one that is not there is told without importing torch

    from shardwright.checkpoint.export import inspect as inspect_checkpoint

    click.echo("\n".join(inspect_checkpoint(checkpoint, check=not no_check).lines()))


if __name__ == "__main__":
    main()
