"""The demo: train a small model on local ranks, then let plain transformers read it and write a line."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.rule import Rule
from rich.syntax import Syntax

from shardwright.train.config import TrainConfig, load_config
from shardwright.train.pulse import pulse
from shardwright.train.start import start

CONFIG = Path("runs", "quickstart.yaml")
PROMPT = "        if not self"
NEXT = """\
[bold]What next[/]

Change the mesh. Every step's loss stays the same but for rounding:
  shardwright train {config} sharding.tp=4 sharding.dp_shard=1

Your own text:
  shardwright train {config} data.paths=my/texts \\
      data.include='*.txt' output.dir=runs/mine

Your own model:
  shardwright train {config} model.config=null \\
      model.path=my/checkpoint tokenizer.vocab_size=null output.dir=runs/tuned

All settings: {output}/config.yaml has every key of this run.
"""


def run(overrides: Sequence[str]) -> None:
    """Write the config to ``runs/quickstart.yaml``, where there is none, and run it.

    Args:
        overrides: ``KEY=VALUE``, as for ``shardwright train``.

    Raises:
        ShardwrightError: as ``shardwright train``.
    """
    console = Console()
    if not CONFIG.exists():
        CONFIG.parent.mkdir(exist_ok=True)
        CONFIG.write_text(files("shardwright.demo").joinpath("quickstart.yaml").read_text())
    config = load_config(CONFIG, overrides)
    with pulse(lambda: "importing libraries"):
        overrides = [*_on_cpu(config), *overrides]
    console.print(Rule("Train"))
    command = shlex.join(["shardwright", "train", str(CONFIG), *overrides])
    console.print(f"$ {command}", style="bold", highlight=False, markup=False, soft_wrap=True)
    start(CONFIG, overrides)

    console.print(Rule("Reload with plain transformers"))
    folder = Path(config.output.dir, "model")
    with pulse(lambda: "reading the model and writing with it"):
        text = complete(folder, PROMPT).strip()
    console.print(f"{folder} was given [bold]{PROMPT.strip()}[/] and wrote the rest of the line:", highlight=False)
    console.print(Syntax(text, "python", theme="ansi_dark", word_wrap=True))
    console.print("So few steps teach it what Python looks like, not what it means.\n", style="dim")
    console.print(NEXT.format(config=CONFIG, output=config.output.dir), highlight=False, soft_wrap=True)


def _on_cpu(config: TrainConfig) -> list[str]:
    """What to add where there are GPUs, and fewer than ranks, so that everyone sees as many ranks."""
    import torch

    return ["device=cpu"] if 0 < torch.cuda.device_count() < config.sharding.least_world_size else []


def complete(folder: Path, prompt: str) -> str:
    """The prompt and what the saved model writes after it, to the end of the line.

    Greedy; the penalty keeps a model this young from saying one word over and over.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    given = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**given, max_new_tokens=24, do_sample=False, repetition_penalty=1.2)
    return prompt + tokenizer.decode(ids[0, given["input_ids"].shape[1] :]).partition("\n")[0]
