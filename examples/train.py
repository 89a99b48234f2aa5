import torch
import torch.distributed as dist

from shardwright import ParallelConfig, load_pretrained, make_mesh, save_pretrained

dist.init_process_group()
config = ParallelConfig(tp=2, sequence_parallel=True)  # dp_shard takes the ranks that are left
mesh = make_mesh(config)
model = load_pretrained("path/to/qwen3", config, mesh, dtype=torch.float32)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
numbers = torch.Generator().manual_seed(mesh["dp"].get_local_rank())  # ranks of one tp group share a batch

for _ in range(10):
    ids = torch.randint(0, model.config.vocab_size, (2, 64), generator=numbers).to(model.device)
    model(input_ids=ids, labels=ids).loss.backward()  # nothing else to call
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()

save_pretrained(model, "tuned")  # a folder for AutoModelForCausalLM.from_pretrained
dist.destroy_process_group()
