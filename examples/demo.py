"""The quick start: train a small Llama on four local ranks, then reload it with plain transformers. Run: make demo.

Arguments are passed on to ``shardwright train``, for example: python examples/demo.py steps=20
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.rule import Rule
from rich.syntax import Syntax

from shardwright.errors import ConfigError
from shardwright.train.config import load_config

CONFIG = os.path.relpath(Path(__file__).with_name("quickstart.yaml"))
PROMPT = "        if not self"
NEXT = """\
[bold]What next[/]
  Change the mesh    shardwright train {config} sharding.tp=4 sharding.dp_shard=1
                     Every step's loss stays the same but for rounding: the mesh changes how it is computed, not what.
  Your own text      shardwright train {config} data.paths=my/texts data.include='*.txt' output.dir=runs/mine
  Your own model     shardwright train {config} model.config=null model.path=my/checkpoint \\
                         tokenizer.vocab_size=null output.dir=runs/tuned
  All settings       {output}/config.yaml has every key of this run, defaults included
"""


def main() -> None:
    console = Console()
    try:
        config = load_config(CONFIG, sys.argv[1:])
    except ConfigError as error:
        sys.exit(f"Error: {error}")
    # With fewer GPUs than ranks, so that everyone sees four ranks.
    on_cpu = ["device=cpu"] if 0 < torch.cuda.device_count() < config.sharding.least_world_size else []
    command = ["train", CONFIG, *on_cpu, *sys.argv[1:]]
    console.print(Rule("Train"))
    console.print(f"$ shardwright {' '.join(command)}", style="bold", highlight=False, soft_wrap=True)
    code = subprocess.run([sys.executable, "-m", "shardwright.cli", *command], check=False).returncode
    if code:
        sys.exit(code)

    output = config.output.dir
    console.print(Rule("Reload with plain transformers"))
    console.print(
        f"{output}/model was given [bold]{PROMPT.strip()}[/] and wrote the rest of the line:", highlight=False
    )
    console.print(Syntax(complete(Path(output, "model"), PROMPT).strip(), "python", theme="ansi_dark"))
    console.print("So few steps teach it what Python looks like, not what it means.\n", style="dim")
    console.print(NEXT.format(config=CONFIG, output=output), highlight=False, soft_wrap=True)


def complete(folder: Path, prompt: str) -> str:
    """The prompt and what the saved model writes after it, to the end of the line.

    Greedy; the penalty keeps a model this young from saying one word over and over.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = model.generate(
        **tokenizer(prompt, return_tensors="pt"), max_new_tokens=24, do_sample=False, repetition_penalty=1.2
    )
    text = tokenizer.decode(ids[0, tokenizer(prompt, return_tensors="pt")["input_ids"].shape[1] :])
    return prompt + text.partition("\n")[0]


if __name__ == "__main__":
    main()
