"""Tiny models of the families whose traffic and memory are counted, and what counts it."""

from __future__ import annotations

from collections import Counter

import torch
from peft import LoraConfig, get_peft_model
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen3Config,
)

from shardwright import ParallelConfig, parallelize
from shardwright.distributed.models.build import model_class
from shardwright.verify.ranks import shared_mesh
from shardwright.verify.tiny import shrunk_config

TOKENS = (2, 16)
_COMMON = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def config_of(family: str, layers: int = 2) -> PreTrainedConfig:
    common = _COMMON | {"num_hidden_layers": layers}
    if family == "llama":
        return LlamaConfig(**common)
    if family == "llama one key-value head":
        return LlamaConfig(**(common | {"num_key_value_heads": 1}))
    if family == "qwen3 tied":
        return Qwen3Config(**common, head_dim=8, tie_word_embeddings=True)
    if family == "gemma3":
        return Gemma3TextConfig(**common, head_dim=8)
    if family == "phi3":
        return Phi3Config(**common)
    if family == "mixtral":
        return MixtralConfig(**common, num_local_experts=4, num_experts_per_tok=2)
    return shrunk_config(CONFIG_MAPPING[family]())


def source_of(family: str, layers: int = 2) -> PreTrainedConfig | torch.nn.Module:
    """What the prediction is asked about: a config, or a model with adapters."""
    if family != LORA:
        return config_of(family, layers)
    made = config_of("llama", layers)
    with torch.device("meta"):
        return get_peft_model(AutoModelForCausalLM.from_config(made), LoraConfig(r=4, target_modules="all-linear"))


LORA = "llama with LoRA"
FAMILIES = ("llama", "llama one key-value head", "qwen3 tied", "gemma3", "phi3", "mixtral")
# Tiny copies of types that have the other styles; an encoder and a decoder; cross-attention that never runs; blocks
# that run twice, and blocks that cannot run on a part of the sequence.
OTHER_FAMILIES = (LORA, "longcat_flash", "gpt_oss", "gemma3n_text", "llama4_text", "mt5", "bart", "zamba2")

WHOLE_EXPERTS = {
    "model.layers.*.self_attn.q_proj": "colwise",
    "model.layers.*.self_attn.k_proj": "colwise",
    "model.layers.*.self_attn.v_proj": "colwise",
    "model.layers.*.self_attn.o_proj": "rowwise",
    "model.layers.*.mlp.experts": "ep_dispatch_experts",
    "model.layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
    "model.layers.*.mlp.experts.down_proj": "grouped_gemm",
}

SUMMED_EXPERTS = WHOLE_EXPERTS | {
    "model.layers.*.mlp.experts": "all_reduce",
    "model.layers.*.mlp.experts.gate_up_proj": "packed_colwise",
    "model.layers.*.mlp.experts.down_proj": "rowwise",
}

# Plans with styles that none of the families has, by path -> the family that each is for.
STYLE_PLANS = {"estimate_models.WHOLE_EXPERTS": "mixtral", "estimate_models.SUMMED_EXPERTS": "mixtral"}

Counts = dict[tuple[str, bool], tuple[int, int]]
_KINDS = {
    "all_reduce": "all_reduce",
    "all_gather_into_tensor": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
}


class Counted(TorchDispatchMode):
    """Counts functional collectives, which only tensor parallelism issues, and the bytes of their whole tensors."""

    def __init__(self, tp: int) -> None:
        super().__init__()
        self.tp = tp
        self.backward = False
        self.calls: Counter[tuple[str, bool]] = Counter()
        self.bytes: Counter[tuple[str, bool]] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.partition(".")[0]
        if func.namespace == "_c10d_functional" and name in _KINDS:
            kind = _KINDS[name], self.backward
            self.calls[kind] += 1
            self.bytes[kind] += args[0].numel() * args[0].element_size() * (self.tp if "gather" in name else 1)
        return func(*args, **(kwargs or {}))


def unsharded(family: str, layers: int) -> torch.nn.Module:
    torch.manual_seed(0)
    made = config_of("llama" if family == LORA else family, layers)
    model: torch.nn.Module = model_class(made)._from_config(made, dtype=torch.float32)
    if family == LORA:
        model.enable_input_require_grads()  # the prediction has a gradient go through the first block, too
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    return model


def sharded(family: str, layers: int, config: ParallelConfig) -> torch.nn.Module:
    return parallelize(unsharded(family, layers), config, shared_mesh(config))


def real_traffic(cases: list[tuple[str, int, ParallelConfig]]) -> list[Counts]:
    """The calls and bytes of one forward and backward, by kind and phase, on this rank."""
    found = []
    for family, layers, config in cases:
        model = sharded(family, layers, config)
        ids = torch.arange(TOKENS[0] * TOKENS[1]).view(TOKENS)
        with Counted(config.tp) as counted:
            loss = model(input_ids=ids, labels=ids).loss
            counted.backward = True
            loss.backward()
        found.append({key: (counted.calls[key], counted.bytes[key]) for key in counted.calls})
    return found


def real_memory(family: str, config: ParallelConfig) -> tuple[int, int, int]:
    """Bytes of this rank's parameters, gradients and AdamW averages after a real step."""
    model = sharded(family, 2, config)
    ids = torch.arange(TOKENS[0] * TOKENS[1]).view(TOKENS)
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    parameters = list(model.parameters())
    gradients = [param.grad for param in parameters if param.grad is not None]
    averages = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    return _bytes(parameters), _bytes(gradients), _bytes(averages)


def _bytes(tensors: list[torch.Tensor]) -> int:
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return sum(tensor.numel() * tensor.element_size() for tensor in local)


class GatherCount(TorchDispatchMode):
    """FSDP2's collectives, which are not functional ones: calls, and bytes of the whole buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.backward = False
        self.calls: Counter[str] = Counter()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            gather = "gather" in func.__name__
            phase = "backward" if self.backward else "forward"
            self.calls[f"{phase}_gathers" if gather else "reduces"] += 1
            whole = args[0] if gather else args[1]  # (output, input, ...)
            self.bytes += whole.numel() * whole.element_size()
        return func(*args, **(kwargs or {}))


def real_gathers(cases: list[tuple[str, ParallelConfig]]) -> list[tuple[dict[str, int], int]]:
    """(calls, bytes) of one forward and backward, after a first step."""
    found = []
    for family, config in cases:
        model = sharded(family, 4, config)
        ids = torch.arange(TOKENS[0] * TOKENS[1]).view(TOKENS)
        model(input_ids=ids, labels=ids).loss.backward()
        with GatherCount() as counted:
            loss = model(input_ids=ids, labels=ids).loss
            counted.backward = True
            loss.backward()
        found.append((dict(counted.calls), counted.bytes))
    return found
