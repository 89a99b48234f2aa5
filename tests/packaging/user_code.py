"""What a user's own code sees of Shardwright's types; mypy reads it (make lint), nothing runs it."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import shardwright
from shardwright import ParallelConfig, load_pretrained, make_mesh, parallelize, save_pretrained
from shardwright.distributed.parallelizer import fsdp2_strategy_parallelize, get_lm_ac_layers, unshard_fsdp2_model
from shardwright.estimate import predict
from shardwright.losses import linear_cross_entropy
from shardwright.verify import Report, verify

config = ParallelConfig(tp=2, sequence_parallel=True, precision="bf16")
mesh = make_mesh(config)
model: LlamaForCausalLM = parallelize(LlamaForCausalLM(LlamaConfig()), config, mesh)
module: torch.nn.Module = fsdp2_strategy_parallelize(model, mesh)
loaded: PreTrainedModel = load_pretrained("folder", ParallelConfig(precision={"param": "bfloat16"}))
save_pretrained(model, "folder")
blocks: list[torch.nn.Module] = get_lm_ac_layers(model)
with unshard_fsdp2_model(model):
    pass
report: Report = verify("qwen3", config)
size: int = predict("qwen3", config).memory.total
loss: torch.Tensor = linear_cross_entropy(torch.ones(1, 2), torch.ones(3, 2), torch.zeros(1))
dtype: str = config.precision.param
again: Report = shardwright.verify.verify("qwen3", config)
