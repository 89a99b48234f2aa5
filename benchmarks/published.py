"""Rows that others published, read as what an estimate takes; and why a row cannot be compared."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from shardwright import ParallelConfig
from shardwright.distributed.plan import ParallelPlan
from shardwright.distributed.planning.decided import ROOT, DecidedPlan
from shardwright.distributed.precision import Precision
from shardwright.estimate.hardware import Machine, load_fabric, load_machine
from shardwright.estimate.trace.kernels import Sending
from shardwright.estimate.trace.whole import Part
from shardwright.estimate.workload import Workload

SOURCES = Path(__file__).parent / "published_sources.yaml"
GIB = 2**30
_DTYPES = {"bf16": "bfloat16", "fp32": "float32", "fp16": "float16"}
_DEVICES = {
    "GB200": "gb200", "B200": "b200", "H200": "h200", "H100 NVL": "h100-nvl", "H100 PCIe": "h100-pcie",
    "H100": "h100-80gb", "A100": "a100-80gb", "L40S": "l40s", "4090": "rtx4090", "MI300X": "mi300x",
}  # fmt: skip
_SXM_WATTS = 700  # of the H100 and H200 whose peaks the files state
_ROOT_RESHARDS = (2, 8)  # torch: before, FSDP2 kept the root gathered after forward, whatever it was told


@dataclass(frozen=True)
class Framework:
    """What another program does otherwise than Shardwright.

    Attributes:
        root_reshards: FSDP2 frees the root's parameters after forward, too.
        compiled: ``""``, ``"blocks"`` or ``"model"``.
        gathers_by_layer: under sequence parallelism every layer that reads the stream gathers it by itself.
    """

    root_reshards: bool = False
    compiled: str = ""
    gathers_by_layer: bool = False

    def decided(self, plan: DecidedPlan) -> DecidedPlan:
        """The decisions, as this program takes them."""
        compiled = (ROOT,) if self.compiled == "model" else plan.blocks if self.compiled == "blocks" else ()
        data = plan.data
        if data is not None and self.root_reshards:
            units = (replace(unit, reshard_after_forward=True) if ROOT in unit.modules else unit for unit in data.units)
            data = replace(data, units=tuple(units))
        return replace(plan, data=data, compiled=compiled, compile_backend="inductor" if compiled else None)

    def parts(self, parts: tuple[Part, ...]) -> tuple[Part, ...]:
        """The traced step, with the collectives that readers of one input share made by each of them."""
        return tuple(map(self._by_layer, parts)) if self.gathers_by_layer else parts

    def _by_layer(self, part: Part) -> Part:
        """Of a Llama block 5 layers read the stream, in 2 places. A compiler merges equal gathers, but not sums."""
        sent = part.segment.sent
        stream = max((each.bytes for each in sent if each.kind == "reduce_scatter"), default=0)
        if not part.where or not stream:
            return part
        more: Counter[Sending] = Counter()
        if part.segment.backward:
            more[Sending("reduce_scatter", stream)] = 3
        if not self.compiled:
            more[Sending("all_gather", stream)] = 3
        return replace(part, segment=replace(part.segment, sent=sent + more))


@dataclass(frozen=True)
class Row:
    """One measurement, and what was measured.

    Attributes:
        tokens: a second on one GPU; None where that is not compared.
        bytes: None where they are not compared.
        counted: ``"allocated"``, ``"reserved"`` or ``"device"`` (what the driver shows).
    """

    name: str
    source: str
    model: PreTrainedConfig
    weights: str
    config: ParallelConfig
    workload: Workload
    machine: Machine
    gpus: int
    tokens: float | None
    bytes: float | None
    counted: str = "allocated"
    framework: Framework | None = None


class NotComparableError(Exception):
    """A row cannot be compared; the message says why."""


def published_rows(path: Path) -> Iterator[Row]:
    """The rows of a file that can be compared. Of the others it is told why they cannot."""
    sources = yaml.safe_load(SOURCES.read_text())
    for data in yaml.safe_load(path.read_text()):
        try:
            yield _row(data, sources.get(data["source"]["repo"], {}))
        except NotComparableError as error:
            print(f"not compared: {data['id']} ({error})")


def _row(data: Mapping[str, Any], source: Mapping[str, Any]) -> Row:
    _require_a_counterpart(data)
    tokens, size = _measured(data)
    layout, engine = data["layout"], str(data["engine"])
    fsdp2 = engine.startswith("FSDP2")
    accumulation = data["grad_accum"] or 1
    config = ParallelConfig(
        dp_shard=layout["dp_shard"] or 1, dp_replicate=layout["dp_replicate"] or 1, tp=layout["tp"] or 1,
        cp=layout["cp"] or 1, sequence_parallel=bool(layout["sp"]) and (layout["tp"] or 1) > 1,
        precision=_precision(data["precision"]) if fsdp2 else Precision(),
        activation_checkpointing=_checkpointing(str(data["activation_checkpointing"] or "none")),
        reshard_after_forward=_resharding(str(data["reshard_after_forward"]), fsdp2), plan=_gathered_logits(data),
    )  # fmt: skip
    kept = _kept(data["precision"])
    return Row(
        data["id"], data["source"]["repo"], _model(data["model"]), kept, config,
        Workload(
            data["seq_len"], data["micro_batch_per_dp_rank"], accumulation, _optimizer(str(data["optimizer"])),
            optimizer_dtype=_states(data["precision"], kept), reduce_last_only=_reduces_last(data) and accumulation > 1,
            loss="model" if ".float()" in str(data["loss"]["kind"]) else "logits",
        ),
        _machine(data, source), data["gpus"], tokens, size, _counted(str(data["measured"]["memory_kind"])),
        Framework(
            fsdp2 and _root_reshards(data), _compiled(data["compile"], fsdp2), source.get("gathers_by_layer", False)
        ),
    )  # fmt: skip


def _require_a_counterpart(data: Mapping[str, Any]) -> None:
    """Raise where the source does what an estimate cannot say, or does not say what an estimate needs."""
    layout, model = data["layout"], data["model"]
    for what, found in (
        ("float8", data["float8"]), ("LoRA", data["lora"]), ("offload", data["offload"]), ("experts", model["moe"]),
        ("asynchronous tensor parallelism", data["async_tp"]),
        ("pipeline stages", (layout["pp"] or 1) > 1), ("context parallelism", (layout["cp"] or 1) > 1),
        ("expert parallelism", (layout["ep"] or 1) > 1), ("a chunked loss", data["loss"]["chunked"]),
    ):  # fmt: skip
        if found:
            raise NotComparableError(f"{what}{'' if found is True else f' {found}'}: not read from published rows")
    if not re.match(r"FSDP2|single process|TP only|DDP", str(data["engine"])):
        raise NotComparableError(f"engine {data['engine']}: no counterpart here")
    needed = {"seq_len": data["seq_len"], "micro_batch_per_dp_rank": data["micro_batch_per_dp_rank"]}
    needed |= {"gpus": data["gpus"], "gpu": data["gpu"]["name"], "optimizer": data["optimizer"]}
    if missing := [name for name, value in needed.items() if value is None]:
        raise NotComparableError(f"the source does not say {', '.join(missing)}")


def _measured(data: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """Tokens a second of one GPU, and bytes; None for what is not said, or judged unusable."""
    measured, judge = data["measured"], data["judge"]
    usable = {name: judge[name] in ("full", "partial") for name in ("speed", "memory")}
    tokens = measured["tokens_per_s_per_gpu"] if usable["speed"] else None
    size = measured["peak_memory_gib"] if usable["memory"] else None
    if tokens is None and size is None:
        raise NotComparableError(f"nothing usable was measured; judged {dict(judge)}")
    return tokens, None if size is None else size * GIB


def _checkpointing(said: str) -> str:
    said = said.lower()
    if said.startswith(("none", "full", "off")):
        return "none" if said.startswith("off") else re.split(r"\W", said)[0]
    if found := re.search(r"every (second|third|\d+)\w* (aten\.)?mm", said):
        number = {"second": "2", "third": "3"}.get(found[1], found[1])
        return f"selective_{number}"
    if found := re.match(r"selective, (?:every )?(\d+)", said):
        return f"every_{found[1]}"
    if re.match(r"selective, op\b", said):
        return "selective"
    raise NotComparableError(f"activation checkpointing {said!r}: not understood")


def _resharding(said: str, fsdp2: bool) -> str:
    """``"default"`` keeps the last block alone, which is what most programs do."""
    if not fsdp2 or "except the last" in said:
        return "default"
    return {"true": "always", "false": "never"}.get(said.partition(" ")[0].lower(), "default")


def _root_reshards(data: Mapping[str, Any]) -> bool:
    said = str(data["reshard_after_forward"]).lower()
    version = re.search(r"torch (\d+)\.(\d+)", str(data["versions"]))
    honoured = version is not None and (int(version[1]), int(version[2])) >= _ROOT_RESHARDS
    return honoured and (said == "true" or "root true" in said)


def _compiled(said: Any, fsdp2: bool) -> str:
    """FSDP2's hooks break the graph of a whole model at every block."""
    if said is None or said is False:
        return ""
    return "model" if "whole model" in str(said) and not fsdp2 else "blocks"


def _dtype(said: Any) -> str | None:
    return _DTYPES.get(re.split(r"\W", str(said))[0])


def _kept(precision: Mapping[str, Any]) -> str:
    return _dtype(precision["weights_kept_in"]) or "float32"


def _states(precision: Mapping[str, Any], kept: str) -> str | None:
    said = _dtype(precision["optimizer_states"])
    return None if said == kept else said


def _precision(said: Mapping[str, Any]) -> Precision:
    param = _dtype(said["param"]) or "float32"
    return Precision(param, _dtype(said["reduce"]) or "float32", param)


def _optimizer(said: str) -> str:
    if not said.startswith("AdamW"):
        raise NotComparableError(f"optimizer {said}: not read from published rows")
    return "adamw_fused" if "fused" in said else "adamw"


def _reduces_last(data: Mapping[str, Any]) -> bool:
    """Whether gradients are whole on every rank until the last micro-batch."""
    return any("set_requires_gradient_sync(False)" in doubt for doubt in data["doubt"] or ())


def _counted(said: str) -> str:
    return "reserved" if "reserved" in said else "device" if "smi" in said else "allocated"


def _gathered_logits(data: Mapping[str, Any]) -> str | None:
    """A plan for sources whose tensor parallelism replicates the embedding and gathers logits: they say so."""
    said = any("logits gathered to full vocabulary" in doubt for doubt in data["doubt"] or ())
    if not said or (data["layout"]["tp"] or 1) == 1:
        return None
    columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    styles = {f"model.layers.*.{name}": "colwise" for name in columns}
    styles |= {f"model.layers.*.{name}": "rowwise" for name in ("self_attn.o_proj", "mlp.down_proj")}
    path = Path(tempfile.gettempdir()) / "shardwright-gathered-logits.yaml"
    path.write_text(ParallelPlan(styles | {"lm_head": "colwise_gather_output"}).to_yaml())
    return str(path)


def _model(model: Mapping[str, Any]) -> PreTrainedConfig:
    kind = Qwen3Config if model["qk_norm"] else Qwen2Config if model["qkv_bias"] else LlamaConfig
    sizes: dict[str, Any] = {} if kind is Qwen2Config else {"head_dim": model["head_dim"]}
    return kind(
        hidden_size=model["hidden"], intermediate_size=model["intermediate"], num_hidden_layers=model["layers"],
        num_attention_heads=model["heads"], num_key_value_heads=model["kv_heads"], vocab_size=model["vocab"],
        tie_word_embeddings=bool(model["tied"]), **sizes,
    )  # fmt: skip


def _machine(data: Mapping[str, Any], source: Mapping[str, Any]) -> Machine:
    """What a source says of its GPU, over the file of that device: memory bandwidth and power limit.

    Power goes with clock times voltage squared, and voltage with the clock: the clock goes with its cube root.
    """
    gpu = data["gpu"]
    known = next((key for name, key in _DEVICES.items() if name in gpu["name"]), None)
    if known is None:
        raise NotComparableError(f"{gpu['name']}: no such device here")
    if known == "a100-80gb" and "40" in str(gpu["memory"]):
        known = "a100-40gb"
    machine = load_machine(known, gpus_per_node=source.get("gpus_per_node") or data["gpus_per_node"])
    if "fabric" in source:
        machine = replace(machine, inside=load_fabric(source["fabric"]))
    device = machine.device
    if stated := re.search(r"([\d.]+) TB/s", str(gpu["hbm"])):
        device = replace(device, memory_gb_per_s=float(stated[1]) * 1000)
    if gpu["power_limit_w"] and known in ("h100-80gb", "h200"):
        slower = min(gpu["power_limit_w"] / _SXM_WATTS, 1) ** (1 / 3)
        device = replace(device, teraflops={dtype: peak * slower for dtype, peak in device.teraflops.items()})
    return replace(machine, device=device)
