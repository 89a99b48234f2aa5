"""How long does a training step of mixtures of experts take: with TP, with FSDP2, with experts on ranks of their own.

Shardwright beside transformers' own ways, on two gloo ranks, in the shapes of Mixtral, Qwen3-MoE and DeepSeek-V3. All
contenders of a shape are alive at once and take turns.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from harness.contenders import OURS, Contender, Peer, nurseries
from harness.layouts import Layout
from harness.nursery import Nursery
from harness.results import Results, Table, arguments
from harness.shapes import write_checkpoint
from harness.statistics import in_turns, ratio_text, spread
from step_time import SIZES

THEIRS = Peer("huggingface", "transformers")  # the same version as ours, so the same interpreter
COMMON: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "vocab_size": SIZES["vocab_size"],
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 128,
    "head_dim": 32,
}
SHAPES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 32, "norm_topk_prob": True},
    "deepseek_v3": {
        "num_key_value_heads": 8, "n_routed_experts": 32, "n_group": 4, "topk_group": 2, "n_shared_experts": 1,
        "first_k_dense_replace": 1, "q_lora_rank": 96, "kv_lora_rank": 64, "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16, "v_head_dim": 32, "head_dim": 16,
    },
}  # fmt: skip
LAYOUTS = (Layout(tp=2), Layout(dp=2), Layout(dp=2, ep=2), Layout(tp=2, ep=2))
Runs = dict[tuple[Peer, Layout], Any]


def run(family: str, forks: dict[Peer, Nursery], folder: Path, rounds: int, results: Results) -> None:
    """A table of one family is added to ``results``."""
    with ExitStack() as stack:
        running: dict[tuple[Peer, Layout], Contender] = {}
        checks: Runs = {}
        for layout in LAYOUTS:
            for peer in (OURS, THEIRS):
                with results.failures_of(f"{peer.title}, {family}, {layout.title}"):
                    contender = stack.enter_context(Contender(peer, layout.ranks, nursery=forks.get(peer)))
                    asked = {"peer": peer.name, "folder": str(folder), "layout": vars(layout)}
                    checks[peer, layout] = built = contender.call("step_time:build", **asked)[0]
                    results.versions[peer.title] = built["versions"]
                    running[peer, layout] = contender
        seconds = in_turns({key: partial(_wall, contender) for key, contender in running.items()}, rounds)
        counts = {key: contender.call("step_time:sent")[0] for key, contender in running.items()}
    columns = ["contender", "layout", "median s", "spread", "ours / theirs (spread)", "collectives", "MB sent"]
    table = Table(family, [*columns, "share of weights", "losses"])
    for (peer, layout), values in seconds.items():
        ours = seconds.get((OURS, layout))
        against = ratio_text(ours, values) if ours is not None and peer is THEIRS else ""
        moved = [str(counts[peer, layout]["calls"]), f"{counts[peer, layout]['MB']:.1f}"]
        built = checks[peer, layout]
        shown = [f"{built['share']:.2f}", f"{built['loss']:.4f}, {built['next']:.4f}"]
        table.rows.append([peer.title, layout.title, f"{median(values):.3f}", spread(values), against, *moved, *shown])
    results.tables.append(table)


def _wall(contender: Contender) -> float:
    return max(answer["wall"] for answer in contender.call("step_time:step"))


def main() -> None:
    options = arguments(__doc__).parse_args()
    results = Results(
        "expert_step",
        "Training step of mixtures of experts, 2 gloo ranks",
        "20M-parameter models with experts, float32, 2 rows of 128 tokens, or one for each of two data-parallel ranks; "
        "forward, backward and stock AdamW, one thread a rank. All contenders of a model alive at once, one step each "
        "in turns; ratios are medians of the rounds' ratios. Collectives, and what a rank sends in them, are counted "
        "in one step that is not timed.",
    )
    with tempfile.TemporaryDirectory(prefix="bench-experts-") as scratch, nurseries((OURS, THEIRS)) as forks:
        for family, sizes in SHAPES.items():
            folder = write_checkpoint(Path(scratch) / family, family, **{**COMMON, **sizes})
            run(family, forks, folder, 2 if options.quick else 9, results)
            results.save()
    results.write()


if __name__ == "__main__":
    main()
