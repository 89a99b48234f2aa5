"""Every file that Shardwright reads, damaged at random: the same values come out, or one clear error, and soon.

    python tests/faults/fuzz.py                                # 20,000 mutations; half an hour
    python tests/faults/fuzz.py --mutations 500 --seed 7
    python tests/faults/fuzz.py --only tokenizer.json

Where a manifest has the checksum of a file, nothing but the same values or an error may come out. Where it has been
sealed anew behind the damage, and for files that no manifest covers, other values may (``limit``): a damaged number
looks like a number. Never may anything be run, removed or fetched, a traceback come out, or ten seconds pass, or 500 MB
be taken.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mutations import mutate

from shardwright.checkpoint.description import read_tokenizer
from shardwright.checkpoint.export import inspect
from shardwright.checkpoint.load import load_pretrained
from shardwright.checkpoint.manifest import MANIFEST, write_manifest
from shardwright.checkpoint.save import save_pretrained
from shardwright.checkpoint.state import RunState
from shardwright.checkpoint.store import CheckpointStore, load_checkpoint
from shardwright.distributed.config import ParallelConfig
from shardwright.distributed.mesh import make_mesh
from shardwright.distributed.models.build import build_on_meta, load_config
from shardwright.distributed.plan import ParallelPlan
from shardwright.errors import ShardwrightError, from_system
from shardwright.estimate.hardware import load_machine
from shardwright.train.config import load_config as load_run
from shardwright.train.encoding import encode
from shardwright.train.metrics import MetricsFiles
from shardwright.train.text import Piece, read_texts
from shardwright.train.tokenizer import train_tokenizer

SECONDS, MEGABYTES = 10.0, 500
_HANGS = 120.0  # seconds of wall time after which a child is given up
_BATCH = 16
# What Python tells of before it does it, and reading a file never needs.
_FORBIDDEN = (
    "os.system", "subprocess.Popen", "os.exec", "os.spawn", "os.posix_spawn", "pty.spawn", "pickle.find_class",
    "socket.connect", "os.remove", "os.rmdir", "shutil.rmtree",
)  # fmt: skip
SIZES: dict[str, int] = {
    "vocab_size": 280,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@dataclass(frozen=True)
class Target:
    """A file, and what reads it.

    Attributes:
        name: for people.
        folder: which of the folders that :func:`make` makes it is in.
        file: its path in there.
        read: what comes out of the folder; compared with what comes out of the undamaged one.
        sealed: a manifest has its checksum.
    """

    name: str
    folder: str
    file: str
    read: Callable[[Path], Any]
    sealed: bool = False


def make(root: Path) -> None:
    """Undamaged folders of every kind."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    text = Path(os.__file__).with_name("this.py").read_text() * 3
    tokenizer = train_tokenizer([text], vocab_size=280)
    config = LlamaConfig(
        vocab_size=280, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4
    )
    model = LlamaForCausalLM(config)
    save_pretrained(model, root / "model", tokenizer)
    save_pretrained(model, root / "shards", tokenizer, max_shard_size="8KB")
    state = _state(model)
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    state.optimizer.step()
    store = CheckpointStore(root / "run", model, tokenizer)
    store.save(state, 2, {"data_step": 2}, metric=1.5, notes={"mesh": "tp=1"}, wait=True)
    store.close()
    others = root / "others"
    others.mkdir()
    (others / "run.yaml").write_text(
        "model:\n  config: &model {model_type: llama, hidden_size: 32}\n"
        "tokenizer: {vocab_size: 300}\ndata: {paths: [\"stdlib:json\"], include: '*.py'}\n"
        "sharding: {tp: 2, precision: bf16}\noptimizer: {lr: 3e-4, betas: [0.9, 0.95]}\nsteps: 100\n"
    )
    plan = ParallelPlan({"model.layers.*.mlp.up_proj": "colwise", "lm_head": "colwise"}, frozenset({"lm_head"}))
    (others / "plan.yaml").write_text(plan.to_yaml())
    (others / "plan.json").write_text(plan.to_json())
    (others / "device.yaml").write_text(
        "name: a GPU\nmemory_mib: 80000\nteraflops: {float32: 60, bfloat16: 900}\nmemory_gb_per_s: 3000\n"
        "fabric: nvlink4\ngpus_per_node: 8\nsource: a test\ndollars_per_hour: 2.5\n"
    )
    lines = [json.dumps({"step": step, "loss": 5.0 / step, "lr": 1e-3}) for step in range(1, 9)]
    (others / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (others / "text.jsonl").write_text("\n".join(json.dumps({"text": f"line {n} é"}) for n in range(20)) + "\n")
    (others / "text.txt").write_text(text)
    tokenizer.save_pretrained(others / "tokenizer")


def _state(model: Any) -> RunState:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return RunState(model, optimizer, None, frozenset({"step", "exp_avg", "exp_avg_sq"}))


def _weights(folder: Path) -> Any:
    model = load_pretrained(folder, ParallelConfig(dp_shard=1), make_mesh(ParallelConfig(dp_shard=1), "cpu"))
    values = {name: value.clone() for name, value in model.state_dict().items()}
    return values, model.config.to_json_string(), model.generation_config.to_json_string()


def _meta(folder: Path) -> Any:
    config = load_config(folder)
    return {name: tuple(value.shape) for name, value in build_on_meta(config).state_dict().items()}


def _tokens(folder: Path) -> Any:
    tokenizer = read_tokenizer(folder)
    parts = encode([Piece("Beautiful is better than ugly. é 日本")], tokenizer)
    return [part.ids.tolist() for part in parts], tokenizer.eos_token_id


def _sealed_tokens(folder: Path) -> Any:
    from shardwright.checkpoint.manifest import verify

    verify(folder)
    return _tokens(folder)


def _checkpoint(folder: Path) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    path = folder / "step-00000002"
    lines = inspect(path).lines()
    state = _state(LlamaForCausalLM(LlamaConfig(**SIZES)))
    info = load_checkpoint(path, state)
    return lines[1:], info, {name: value.clone() for name, value in state.tensors().items()}, torch.get_rng_state()


def _metrics(folder: Path) -> Any:
    with MetricsFiles(folder, tensorboard=False, done=8) as files:
        return files.losses


def _text(name: str) -> Callable[[Path], Any]:
    def read(folder: Path) -> Any:
        tokenizer = read_tokenizer(folder / "tokenizer")
        return [part.ids.tolist() for part in encode(read_texts([folder / name], "text"), tokenizer)]

    return read


def _plan(folder: Path) -> Any:
    return ParallelPlan.from_yaml((folder / "plan.yaml").read_bytes())


def _json_plan(folder: Path) -> Any:
    return ParallelPlan.from_json((folder / "plan.json").read_bytes())


def _machine(folder: Path) -> Any:
    return load_machine(str(folder / "device.yaml"))


def targets(root: Path) -> list[Target]:
    """Every kind of file there is, in every folder it is read from."""
    shard = sorted(path.name for path in (root / "shards").glob("model-*"))[1]
    found = [Target(file, "model", file, _weights, True) for file in ("model.safetensors", "config.json", MANIFEST)]
    found += [Target("generation_config.json", "model", "generation_config.json", _weights, True)]
    found += [Target("index", "shards", "model.safetensors.index.json", _weights, True)]
    found += [Target("one of several safetensors", "shards", shard, _weights, True)]
    found += [Target("config.json of plan", "model", "config.json", _meta)]
    for file in ("tokenizer.json", "tokenizer_config.json"):
        found += [Target(file, "model", file, _sealed_tokens, True), Target(f"{file} alone", "model", file, _tokens)]
    for path in sorted((root / "run" / "step-00000002").rglob("*")):
        if path.is_file():
            name = path.relative_to(root / "run" / "step-00000002").as_posix()
            found.append(Target(f"checkpoint's {name}", "run", f"step-00000002/{name}", _checkpoint, name != MANIFEST))
    found += [
        Target("run.yaml", "others", "run.yaml", lambda folder: load_run(folder / "run.yaml")),
        Target("plan.yaml", "others", "plan.yaml", _plan),
        Target("plan.json", "others", "plan.json", _json_plan),
        Target("device.yaml of estimate", "others", "device.yaml", _machine),
        Target("metrics.jsonl", "others", "metrics.jsonl", _metrics),
        Target("text.jsonl", "others", "text.jsonl", _text("text.jsonl")),
        Target("text.txt", "others", "text.txt", _text("text.txt")),
    ]
    return found


def run(mutations: int, seed: int, only: str = "", seconds: float | None = None) -> tuple[Counter[str], list[str]]:
    """How often each outcome came, and what should not have been.

    Args:
        seconds: after which no new ones are begun.
    """
    outcomes: Counter[str] = Counter()
    bad: list[str] = []
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        root = Path(folder)
        make(root / "whole")
        known = [target for target in targets(root / "whole") if only in target.name]
        jobs = [(number, known[number % len(known)]) for number in range(mutations)]
        jobs.sort(key=lambda job: known.index(job[1]))
        end = time.monotonic() + (seconds or float("inf"))
        while jobs and time.monotonic() < end:
            batch, jobs = jobs[:_BATCH], jobs[_BATCH:]
            told = list(_in_a_child(root, batch, seed))
            jobs = batch[len(told) :] + jobs
            for (number, target), outcome in zip(batch, told, strict=False):
                kind, _, what = outcome.partition(": ")
                outcomes[kind] += 1
                if kind == "bad":
                    bad.append(f"{target.name}, mutation {number} of seed {seed}: {what}")
    return outcomes, bad


def _in_a_child(root: Path, batch: Sequence[tuple[int, Target]], seed: int) -> Iterator[str]:
    """The outcome of each, up to one that ends the process it runs in: that one's outcome is how it ended."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        code = 1
        try:
            _child(root, batch, seed, writing)
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    done = 0
    with os.fdopen(reading, "rb") as stream:
        while done < len(batch):
            if not select.select([stream], [], [], _HANGS)[0]:
                os.kill(pid, signal.SIGKILL)
                yield f"bad: it did not end within {_HANGS:g} seconds"
                break
            line = stream.readline()
            if not line:
                break
            done += 1
            yield json.loads(line)
    status = os.waitpid(pid, 0)[1]
    if done < len(batch) and os.WIFSIGNALED(status) and os.WTERMSIG(status) != signal.SIGKILL:
        yield f"bad: the process was ended by {signal.Signals(os.WTERMSIG(status)).name}"
    elif done < len(batch) and not os.WIFSIGNALED(status):
        yield f"bad: the process ended with code {os.WEXITSTATUS(status)}"


def _child(root: Path, batch: Sequence[tuple[int, Target]], seed: int, writing: int) -> None:
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)  # Rust tells of a panic there
    events: list[str] = []
    watching = [False]

    def hook(event: str, arguments: Any) -> None:
        if watching[0] and event in _FORBIDDEN:
            events.append(f"{event}{arguments!r}"[:200])

    sys.addaudithook(hook)
    expected: dict[str, Any] = {}
    with os.fdopen(writing, "wb") as stream:
        for number, target in batch:
            if target.read is _weights and not dist.is_initialized():
                dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
            if target.read is not _weights and dist.is_initialized():
                dist.destroy_process_group()
            if target.name not in expected:
                expected[target.name] = target.read(_copy(root, target))
            outcome = _one(root, number, target, seed, expected[target.name], events, watching)
            stream.write(json.dumps(outcome).encode() + b"\n")
            stream.flush()


def _copy(root: Path, target: Target) -> Path:
    folder = root / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(root / "whole" / target.folder, folder)
    return folder


def _one(
    root: Path, number: int, target: Target, seed: int, expected: Any, events: list[str], watching: list[bool]
) -> str:
    chance = random.Random(f"{seed} {number}")
    folder = _copy(root, target)
    file = folder / target.file
    others = [path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()]
    whole = damaged = file.read_bytes()
    while damaged == whole:
        damaged = mutate(whole, chance, others)
    file.write_bytes(damaged)
    sealed = target.sealed and chance.random() < 0.4
    if target.sealed and not sealed:
        _seal(file)
    events.clear()
    begin, memory = time.process_time(), _peak()
    watching[0] = True
    with _Caught() as caught, contextlib.redirect_stdout(None):
        value = target.read(folder)
    watching[0] = False
    if isinstance(caught.error, ShardwrightError) or (caught.error and from_system(caught.error)):
        outcome = "error" if len(str(caught.error)) < 3000 else "bad: an error of a whole page"
    elif caught.error is not None:
        outcome = f"bad: {type(caught.error).__name__}: {caught.error}"
    else:
        outcome = "same" if _equal(value, expected) else "bad: other values under a manifest" if sealed else "limit"
    if events:
        return f"bad: it did {events[0]}"
    if time.process_time() - begin > SECONDS:
        return f"bad: it took {time.process_time() - begin:.0f} seconds, then {outcome}"
    if _peak() - memory > MEGABYTES:
        return f"bad: it took {_peak() - memory} MB, then {outcome}"
    return outcome


class _Caught:
    """Holds whatever leaves the block."""

    error: BaseException | None = None

    def __enter__(self) -> _Caught:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> bool:
        self.error = error
        return True


def _seal(file: Path) -> None:
    folder = next(parent for parent in file.parents if (parent / MANIFEST).is_file())
    if file.name != MANIFEST:
        (folder / MANIFEST).unlink()
        write_manifest(folder, {})


def _peak() -> int:
    """The most memory that this process has had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and _bytes(one) == _bytes(other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(_equal(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mutations", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    outcomes, bad = run(options.mutations, options.seed, options.only)
    print(*(f"{count:6} {kind}" for kind, count in outcomes.most_common()), *bad, sep="\n")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
