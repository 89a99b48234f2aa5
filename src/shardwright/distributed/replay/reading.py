"""``ModelReading``: everything that is read off a model, once, for all decisions.

Structure is read from the modules. What the code does is read from one recorded run of a copy without weights: which
layers a tensor passes, what is used while its module does not run, what every block was called with.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count, takewhile
from typing import Any

from torch import Tensor, nn

from shardwright._torch import DropoutNd
from shardwright.distributed.models.blocks import block_names
from shardwright.distributed.models.heads import HeadCounts, head_counts
from shardwright.distributed.models.huggingface import embedding_name, head_name
from shardwright.distributed.models.ties import Tie, find_ties
from shardwright.distributed.replay.inputs import candidate_inputs
from shardwright.distributed.replay.rank_model import Sharding
from shardwright.distributed.replay.record import CODE_ERRORS, Mismatch
from shardwright.distributed.replay.runs import Inputs, Record, check_chunks, full_run, rank_runs
from shardwright.distributed.replay.short_chunks import Chunks
from shardwright.distributed.replay.weightless import WeightlessCopy, weightless_copy

logger = logging.getLogger(__name__)


@dataclass
class Recording:
    """A copy without weights, inputs that it runs with, and what its run left behind."""

    weightless: WeightlessCopy
    inputs: Inputs
    record: Record

    @cached_property
    def repeatable(self) -> bool:
        """Whether a replay with nothing cut comes out the same: the model's code draws no numbers of its own."""
        if self.record.backward_failure:
            return False
        try:
            rank_runs(self.weightless, self.record, self.inputs, Sharding(), 1)
        except (Mismatch, *CODE_ERRORS):
            return False
        return True

    def calls_of(self, name: str) -> int:
        """How often the module called ``name`` in the model (or the one of its kind that stands for it) was called."""
        counted = self.record.calls.counts.get(self.weightless.repeats.stand_in(name), 0)
        return counted or len(self.read_by(name))  # code may call a layer's forward itself

    @cached_property
    def places(self) -> dict[str, int]:
        """Copied module name -> its place in the order in which the modules' first calls ended."""
        return {name: place for place, name in enumerate(self.record.calls.counts)}

    def place_of(self, name: str) -> int | None:
        """The place of the module called ``name`` in the model (or of the one that stands for it) in :attr:`places`."""
        return self.places.get(self.weightless.repeats.stand_in(name))

    def read_by(self, name: str) -> list[Tensor]:
        """The tensor that a linear layer read in each of its calls; none for what is no linear layer.

        A layer that is made of several (an adapted one) reads what the first of them reads.
        """
        sources = self.record.run.sources
        copied = self.weightless.repeats.stand_in(name)
        first = next((stub for stub, _ in sources if stub == copied or stub.startswith(f"{copied}.")), copied)
        return [sources[first, call] for call in takewhile(lambda call: (first, call) in sources, count())]


@dataclass
class ModelReading:
    """What a model is, as far as it decides how it is sharded. Nothing in it depends on the number of ranks.

    Args:
        model: on any device, ``meta`` too; it is not changed, and no weight is read.
        example_inputs: what to call it with: a tensor, a tuple of arguments or a dict of keyword arguments, whose
            values do not matter. None: made from a transformers model's config, or guessed from the first layer.
    """

    model: nn.Module
    example_inputs: Any = None
    _recordings: dict[bool, Recording | str] = field(default_factory=dict, repr=False)

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """All modules, by name; a shared one under its first."""
        return dict(self.model.named_modules())

    @cached_property
    def blocks(self) -> list[str]:
        """The names of the repeated blocks."""
        return block_names(self.model)

    @cached_property
    def ties(self) -> list[Tie]:
        """The parameters that several modules share."""
        return find_ties(self.model)

    @cached_property
    def heads(self) -> HeadCounts | None:
        """Attention heads, as the text model's config states them."""
        return head_counts(self.model)

    @cached_property
    def embedding(self) -> str | None:
        """The name of the input embedding, where the model says which it is."""
        return embedding_name(self.model)

    @cached_property
    def head(self) -> str | None:
        """The name of the output head, where the model says which it is."""
        return head_name(self.model)

    def recording(self, *, every_block: bool = False) -> Recording | None:
        """The recorded run, made when it is first asked for; None where the model cannot be run (:meth:`why_not`).

        Args:
            every_block: of a copy with all blocks; otherwise two of each kind stand for the rest.
        """
        found = self._recorded(every_block)
        return None if isinstance(found, str) else found

    def why_not(self) -> str:
        """Why the model could not be run without its weights; empty where it could."""
        found = self._recorded(False)
        return found if isinstance(found, str) else ""

    def _recorded(self, every_block: bool) -> Recording | str:
        if every_block not in self._recordings:
            self._recordings[every_block] = self._record(every_block)
        return self._recordings[every_block]

    def _record(self, every_block: bool) -> Recording | str:
        """The first run that works, of those that can be replayed before those that cannot."""
        reason, kept = "its inputs could not be guessed", None
        for weightless, inputs in self._trials(every_block):
            try:
                found = Recording(weightless, inputs, full_run(weightless, inputs))
                check_chunks(weightless, found.record, inputs)
            except (Mismatch, *CODE_ERRORS) as error:
                reason = f"it did not run ({type(error).__name__}: {error})".partition("\n")[0]
                logger.debug("%s: %s", type(self.model).__name__, reason)
                continue
            if found.repeatable:
                return found
            kept = kept or found
        return kept or reason

    def _trials(self, every_block: bool) -> Iterator[tuple[WeightlessCopy, Inputs]]:
        """Copies and inputs to try: two blocks of each kind, evaluation mode and short chunks first.

        Some models change their weights for inference (RWKV), or keep back a part of their code in it: they run in
        training mode, with nothing dropped.
        """
        for every, training in ((every_block, False), (True, False), (every_block, True), (True, True)):
            weightless = weightless_copy(self.model, whole=every)
            if training:
                _train_without_dropout(weightless.model)
            chunks = Chunks.of(weightless.model)
            for shortened in (chunks, Chunks()) if chunks else (chunks,):
                weightless.chunks = shortened
                for inputs in candidate_inputs(self.model, self.example_inputs):
                    yield weightless, inputs


def _train_without_dropout(model: nn.Module) -> None:
    model.train()
    for module in model.modules():
        if isinstance(module, DropoutNd):
            module.eval()
