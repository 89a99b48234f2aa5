"""What ``shardwright calibrate`` does."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from shardwright.errors import ConfigError
from shardwright.estimate.calibrate.collectives import Link, measure_local_ranks
from shardwright.estimate.calibrate.files import device_file, fabric_file, write
from shardwright.estimate.calibrate.measure import CPU, GPU, Measured, measure
from shardwright.estimate.hardware import Machine, load_machine
from shardwright.estimate.kernel_time import kernel_seconds
from shardwright.estimate.trace.kernels import Kernel

_BYTES = {"bfloat16": 2, "float16": 2, "tf32": 4, "float32": 4}


def run(output: Path, *, device: str, ranks: int | None, like: str | None, fabric: str | None) -> None:
    """Measure this machine, write what was measured, and show it beside what an estimate makes of it.

    Args:
        output: a YAML file of a device; that of its fabric, where there are several ranks, lies beside it.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        ranks: processes that talk to each other, one for each device; None: one for every GPU, one on a CPU.
        like: a known device whose datasheet has the peaks.
        fabric: that joins the devices, where it is not measured.

    Raises:
        ConfigError: a file exists already or cannot be written; there are no such devices; ``like`` is not known.
    """
    kind = _kind(device)
    count = ranks if ranks is not None else max(torch.cuda.device_count(), 1) if kind == "cuda" else 1
    if kind == "cuda" and count > torch.cuda.device_count():
        raise ConfigError(
            f"ranks is {count}, but this machine has {torch.cuda.device_count()} GPUs: one for each rank."
        )
    beside = output.with_name(f"{output.stem}-fabric.yaml")
    for path in (output, *([beside] if count > 1 else [])):
        if path.suffix != ".yaml":
            raise ConfigError(f"{path} must end in .yaml: that is how --gpu tells a file from a name.")
        if path.exists():
            raise ConfigError(f"{path} exists. Choose another name for --output, or remove it first.")
    known = None if like is None else load_machine(like).device
    place = torch.device(kind, 0) if kind == "cuda" else torch.device("cpu")
    measured = measure(place, GPU if kind == "cuda" else CPU)
    link = measure_local_ranks(count, kind) if count > 1 else None
    when = f"{datetime.now(UTC):%Y-%m-%d}, torch {torch.__version__}"
    joined = beside.name if link is not None else fabric or (known.fabric if known else _usual_fabric(kind))
    if link is not None:
        write(beside, fabric_file(link, f"between the devices of {output.stem}", when))
    write(output, device_file(measured, place, ranks=count, fabric=joined, like=known, when=when))
    show(measured, link, load_machine(str(output)), Console())
    Console().print(f"Saved to {output}: shardwright estimate MODEL --gpu {output} ...", soft_wrap=True)


def _kind(device: str) -> str:
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda, but torch sees no GPU here. Take device cpu, or auto.")
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def _usual_fabric(kind: str) -> str:
    return "pcie4" if kind == "cuda" else "sharedmemory"


def show(measured: Measured, link: Link | None, machine: Machine, console: Console) -> None:
    """What was measured, and what an estimate with the new file says of the same products."""
    table = Table(title=f"Measured on {machine.device.name}")
    for name in ("product (m, n, k)", "dtype"):
        table.add_column(name)
    for name in ("TFLOP/s", "ms", "ms, estimated"):
        table.add_column(name, justify="right")
    for each in measured.products:
        m, n, k = each.shape
        moved = (m * n + n * k + m * k) * _BYTES[each.dtype]
        said = kernel_seconds(Kernel("matmul", each.flops, moved, (1, m, n, k), each.dtype), machine)
        table.add_row(
            f"{m} x {n} x {k}", each.dtype, f"{each.teraflops:.4g}", f"{each.seconds * 1e3:.3f}", f"{said * 1e3:.3f}"
        )
    console.print(table)
    console.print(
        f"Attention {measured.attention:.4g} TFLOP/s forward, {measured.attention_backward:.4g} backward; memory "
        f"{measured.memory_gb_per_s:,.4g} GB/s; {measured.launch_us:.3g} us to launch a kernel.",
        highlight=False,
    )
    if link is not None:
        console.print(
            f"Among {link.ranks} ranks {link.gb_per_s:.4g} GB/s of each, {link.latency_us:.3g} us a step of a ring.",
            highlight=False,
        )
