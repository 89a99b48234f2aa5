"""Which layers of a deep model stay in its tiny copy: at least two, and one of every kind."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

COUNT = re.compile(
    r"(conf_)?num_hidden_layers|n_layers?|num_layers(_per_stack)?|(resampler_)?depth|layers|num_blocks|num_global_layers"
    r"|(num_)?(en|de)coder_layers|num_lstm_layers"
)
# The first so many layers differ from the others (the last so many, for the second pattern).
FIRST = re.compile(
    r"first_k_dense_replace|num_dense_layers|max_window_layers|moe_layer_(start|end)_index|insert_layer_id"
)
LAST = re.compile(r"num_kv_shared_layers")
EVERY = re.compile(
    r".*(_interval|_period|_every_n_layers|_frequency|_sparse_step|_layer_step|_layer_freq|window_pattern|group_size)"
    r"|n_layers_per_\w+"
)
OFFSET = re.compile(r"\w+_layer_offset")
MOST_KINDS = 6  # a list with more different values (a rate per layer, say) does not tell kinds of layers apart


@dataclass(frozen=True)
class LayerChoice:
    """``kept``: indices of the layers to keep; ``changes``: the fields of the config that follow, with their values."""

    kept: tuple[int, ...] = ()
    changes: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Self:
        """The choice for one config; its nested configs are separate."""
        counts = {name: value for name, value in config.items() if COUNT.fullmatch(name) and type(value) is int}
        if not counts:
            return cls()
        total = counts.get("num_hidden_layers", max(counts.values()))
        lists = {name: value for name, value in config.items() if isinstance(value, (list, tuple)) and len(value) > 0}
        indices = {name: value for name, value in lists.items() if _holds_indices(name, value, total)}
        per_layer = {name: value for name, value in lists.items() if name not in indices and len(value) == total}
        first = _matching(FIRST, config)
        last = _matching(LAST, config)
        every = {name: value for name, value in _matching(EVERY, config).items() if value > 1}

        overrides = {int(layer): value for layer, value in (config.get("per_layer_config") or {}).items()}

        def kind(layer: int) -> tuple[Any, ...]:
            return (
                *(str(values[layer]) for values in per_layer.values() if len(set(map(str, values))) <= MOST_KINDS),
                *(layer in values for values in indices.values() if len(values) < total),
                *(layer < border for border in first.values()),
                *(layer >= total - border for border in last.values()),
                str(overrides.get(layer)),
            )

        # Layers called hybrid share one block, and sharing takes two.
        each = 2 if any("hybrid" in map(str, values) for values in per_layer.values()) else 1
        kept = _first_of_each(kind, total, each, at_least=2 if per_layer or not every else 4)
        kept += tuple(range(len(kept), min(total, _longest_cycle(lists, per_layer, total))))
        changes: dict[str, Any] = {name: min(value, 2) for name, value in counts.items()}
        changes |= {name: len(kept) for name, value in counts.items() if value == total}
        changes |= {name: [values[layer] for layer in kept] for name, values in per_layer.items()}
        changes |= {name: [kept.index(i) for i in values if i in kept] for name, values in indices.items()}
        changes |= {name: sum(layer < border for layer in kept) for name, border in first.items()}
        changes |= {name: sum(layer >= total - border for layer in kept) for name, border in last.items()}
        changes |= dict.fromkeys(every, 2)
        changes |= {name: min(value, 1) for name, value in _matching(OFFSET, config).items()}
        return cls(kept, changes)


def _matching(pattern: re.Pattern[str], config: Mapping[str, Any]) -> dict[str, int]:
    return {name: value for name, value in config.items() if pattern.fullmatch(name) and type(value) is int}


def _holds_indices(name: str, values: Sequence[Any], total: int) -> bool:
    """Whether a list names layers by number, like ``[3, 7, 11]``, rather than saying something about each in turn."""
    numbers = all(type(value) is int for value in values)
    if not numbers or not re.search(r"layer|idx|ind|ids", name):
        return False
    return (
        list(values) == sorted(set(values))
        and values[0] >= 0
        and values[-1] <= total
        and (values[-1] > 1 or len(values) == 1)
    )


def _longest_cycle(lists: Mapping[str, Any], per_layer: Mapping[str, Any], total: int) -> int:
    """Length of the longest list of names that is repeated over the layers, like recurrent-recurrent-attention."""
    cycles = [
        len(values)
        for name, values in lists.items()
        if name not in per_layer and len(values) < total and re.search(r"layers?_|block_types|_layers", name)
        and all(isinstance(value, str) for value in values)
    ]  # fmt: skip
    return max(cycles, default=0)


def _first_of_each(kind: Callable[[int], Any], total: int, each: int, at_least: int) -> tuple[int, ...]:
    """The first ``each`` layers of each kind, filled up with the first other layers to ``at_least``, in order."""
    members: dict[Any, list[int]] = {}
    for layer in range(total):
        members.setdefault(kind(layer), []).append(layer)
    kept = {layer for layers in members.values() for layer in layers[:each]}
    for layer in range(total):
        if len(kept) >= at_least:
            break
        kept.add(layer)
    return tuple(sorted(kept))
