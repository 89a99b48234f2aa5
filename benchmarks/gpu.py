"""One GPU: tokens per second, model flops utilisation and peak memory, against plain unsharded torch in the same run.

Llama shapes of 1, 3 and 8 billion parameters in bfloat16, SDPA, fused AdamW, world size 1. Variants take turns, each
built anew. ``--device cpu --shapes tiny`` runs the same code without a GPU, to see that it works.
"""

from __future__ import annotations

import gc
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from harness.contenders import BENCHMARKS
from harness.machine import versions
from harness.results import Results, Table, arguments
from harness.statistics import ratio, spread
from report import render
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from shardwright import ParallelConfig, parallelize

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
    "1b": {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16},
    "3b": {"vocab_size": 128256, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28},
    "8b": {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
}
HEADS = {"tiny": (4, 2), "1b": (32, 8), "3b": (24, 8), "8b": (32, 8)}
# Bytes per parameter of a run: weights, gradients and two moments in bfloat16; and room for activations.
BYTES_PER_PARAMETER, ROOM = 8, 1.5
# Dense bfloat16 peak by the vendor's data sheets (SXM), flop/s.
PEAKS = {"H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12}
GOAL_OVERHEAD, GOAL_MFU = 1.02, 0.45


@dataclass(frozen=True)
class Variant:
    """A way to run the model.

    Attributes:
        config: Shardwright's; None is the model as transformers makes it.
        compiled: every block compiled on its own.
        checkpointing: of the plain model; Shardwright's is in ``config``.
    """

    title: str
    config: ParallelConfig | None = None
    compiled: bool = False
    checkpointing: bool = False


def ours(title: str, **options: Any) -> Variant:
    return Variant(f"Shardwright, {title}", ParallelConfig(**options), compiled=options.get("compile", False))


VARIANTS = (
    Variant("plain torch, eager"),
    ours("eager"),
    ours("FSDP2 with bf16 policy, eager", precision="bf16"),
    Variant("plain torch, compiled blocks", compiled=True),
    ours("compiled blocks", compile=True),
    ours("FSDP2 with bf16 policy, compiled blocks", precision="bf16", compile=True),
    Variant("plain torch, checkpointing", checkpointing=True),
    ours("full checkpointing", activation_checkpointing="full"),
    ours("selective checkpointing", activation_checkpointing="selective"),
)
# What is compared: (ours, plain).
PAIRS = (
    ("Shardwright, eager", "plain torch, eager"),
    ("Shardwright, FSDP2 with bf16 policy, eager", "plain torch, eager"),
    ("Shardwright, compiled blocks", "plain torch, compiled blocks"),
    ("Shardwright, FSDP2 with bf16 policy, compiled blocks", "plain torch, compiled blocks"),
    ("Shardwright, full checkpointing", "plain torch, checkpointing"),
)


@dataclass
class Run:
    """What one run of a variant gave: seconds of its steps, and peak bytes on the device."""

    seconds: list[float]
    peak: int


def build(shape: str, length: int, variant: Variant, device: torch.device) -> nn.Module:
    """The model of ``shape`` in bfloat16 with random weights, run as ``variant`` says."""
    heads, key_values = HEADS[shape]
    config = AutoConfig.for_model(
        "llama",
        **SHAPES[shape],
        num_attention_heads=heads,
        num_key_value_heads=key_values,
        max_position_embeddings=length,
        tie_word_embeddings=False,
        use_cache=False,
    )
    with device:
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    model.train()
    if variant.config is not None:
        return parallelize(model, variant.config)
    if variant.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if variant.compiled:
        for block in model.model.layers:
            block.compile()
    return model


def run(shape: str, rows: int, length: int, variant: Variant, device: torch.device, steps: int, warmup: int) -> Run:
    """Train ``warmup`` + ``steps`` steps on random tokens; the memory is free again afterwards."""
    model = build(shape, length, variant, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    ids = torch.randint(0, SHAPES[shape]["vocab_size"], (rows, length), device=device)
    synchronize, cuda = _synchronizer(device), device.type == "cuda"
    seconds = []
    for number in range(warmup + steps):
        if cuda and number == warmup:
            torch.cuda.reset_peak_memory_stats()
        synchronize()
        began = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronize()
        seconds.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    del model, optimizer
    torch._dynamo.reset()
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
    return Run(seconds[warmup:], peak)


def _synchronizer(device: torch.device) -> Callable[[], None]:
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def flops_per_token(shape: str, length: int) -> float:
    """As torchtitan counts: 6 per parameter outside of the embedding, 12 x layers x width x length for attention."""
    sizes, (heads, key_values) = SHAPES[shape], HEADS[shape]
    width, inner, layers = sizes["hidden_size"], sizes["intermediate_size"], sizes["num_hidden_layers"]
    attention = 2 * width * width * (1 + key_values / heads)
    weights = layers * (attention + 3 * width * inner) + sizes["vocab_size"] * width
    return 6 * weights + 12 * layers * width * length


def parameters(shape: str) -> float:
    """Of both tables and all blocks."""
    return flops_per_token(shape, 0) / 6 + SHAPES[shape]["vocab_size"] * SHAPES[shape]["hidden_size"]


def measure(shape: str, options: Any, device: torch.device, peak_flops: float | None, results: Results) -> None:
    """All variants of one shape, in turns; a table and the goals of it."""
    runs: dict[str, list[Run]] = {}
    for turn in range(options.rounds):
        for variant in VARIANTS[:: 1 if turn % 2 == 0 else -1]:
            if any(failure["who"] == f"{shape}, {variant.title}" for failure in results.failures):
                continue
            try:
                done = run(shape, options.rows, options.length, variant, device, options.steps, options.warmup)
            except torch.OutOfMemoryError as error:
                results.failures.append({"who": f"{shape}, {variant.title}", "error": str(error).splitlines()[0]})
                gc.collect()
                torch.cuda.empty_cache()
                continue
            runs.setdefault(variant.title, []).append(done)
    tokens = options.rows * options.length
    columns = ["variant", "tokens/s", "s per step", "spread", "MFU", "peak GB"]
    table = Table(
        f"{shape}: {parameters(shape) / 1e9:.2f}B parameters, {options.rows} x {options.length} tokens", columns
    )
    utilisation: dict[str, float] = {}
    for title, mine in runs.items():
        seconds = [value for each in mine for value in each.seconds]
        rate = tokens / median(seconds)
        if peak_flops is not None:
            utilisation[title] = rate * flops_per_token(shape, options.length) / peak_flops
        share = f"{utilisation[title]:.1%}" if title in utilisation else "unknown peak"
        peak = max(each.peak for each in mine) / 1e9
        table.rows.append([title, f"{rate:,.0f}", f"{median(seconds):.4f}", spread(seconds), share, f"{peak:.1f}"])
    results.tables.append(table)
    judge(shape, runs, utilisation, results)


def judge(shape: str, runs: dict[str, list[Run]], utilisation: dict[str, float], results: Results) -> None:
    for mine, plain in PAIRS:
        text = f"{shape}: {mine}, time <= {GOAL_OVERHEAD} of {plain}"
        if mine not in runs or plain not in runs:
            results.goal(text, "did not run", None)
            continue
        times = ([median(each.seconds) for each in runs[title]] for title in (mine, plain))
        value = median(ratio(*times))
        results.goal(text, f"{value:.3f}", value <= GOAL_OVERHEAD)
    compiled = [
        value for title, value in utilisation.items() if title.startswith("Shardwright") and "compiled" in title
    ]
    if shape in ("3b", "8b"):
        best = max(compiled, default=None)
        measured = "unknown" if best is None else f"{best:.1%}"
        results.goal(f"{shape}: MFU >= {GOAL_MFU:.0%} compiled", measured, None if best is None else best >= GOAL_MFU)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shapes", nargs="*", choices=tuple(SHAPES), help="Default: 1b, 3b, and 8b where it fits.")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--peak-tflops", type=float, help="Of the device, dense bfloat16; known for some.")
    parser.add_argument("--output", type=Path, default=BENCHMARKS / "RESULTS-GPU.md")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("There is no CUDA device here, so nothing was measured. (--device cpu --shapes tiny tries the code.)")
    if options.quick:
        options.steps, options.warmup, options.rounds = 2, 1, 1
    device = torch.device(options.device, 0) if options.device == "cuda" else torch.device("cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    known = next((peak for part, peak in PEAKS.items() if part in name), None)
    peak_flops = options.peak_tflops * 1e12 if options.peak_tflops else known
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as scratch:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{scratch}/store", rank=0, world_size=1)
        results = Results(
            "gpu",
            f"One device: {name}",
            f"Llama shapes, bfloat16, SDPA, fused AdamW, world size 1, {options.rounds} x {options.steps} steps, "
            "variants in turns, each built anew. MFU by torchtitan's formula, causality not deducted.",
        )
        results.versions["this run"] = versions()
        results.notes.append(
            "FSDP2 on one rank shards nothing, but copies every weight into its buffers and out of them for the forward"
            " and again for the backward, and every gradient through float32."
        )
        for shape in options.shapes or _that_fit(device):
            measure(shape, options, device, peak_flops, results)
            results.save()  # for the case that the time limit comes before the last shape
            options.output.write_text(render({"gpu": asdict(results)}, "Results on a GPU"))
        dist.destroy_process_group()
    results.write()


def _that_fit(device: torch.device) -> list[str]:
    """The shapes whose training state fits the device."""
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 1e9
    return [shape for shape in ("1b", "3b", "8b") if parameters(shape) * BYTES_PER_PARAMETER * ROOM < total]


if __name__ == "__main__":
    main()
