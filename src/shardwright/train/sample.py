"""An example as it is trained on, for a person to look at."""

from __future__ import annotations

from itertools import groupby

import numpy as np
from rich.markup import escape
from transformers import PreTrainedTokenizerBase

from shardwright.train.documents import Document
from shardwright.untrusted import printable

_SHOWN = 400  # tokens


def sample(document: Document, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of ``document``, with rich's markup: what is trained on is green, and between >> and <<, since a log
    file has no colours."""
    parts = [
        f"The first example, of which {int(document.trained.sum())} of {len(document.ids)} tokens are trained on:\n"
    ]
    numbered = zip(document.ids[:_SHOWN], document.trained[:_SHOWN], strict=True)
    for trained, tokens in groupby(numbered, key=lambda one: bool(one[1])):
        ids = np.array([one[0] for one in tokens])
        text = escape(printable(str(tokenizer.decode(ids.tolist(), skip_special_tokens=False))))
        parts.append(f"[bold green]>>{text}<<[/]" if trained else text)
    return "".join([*parts, " ..." if len(document.ids) > _SHOWN else ""])
