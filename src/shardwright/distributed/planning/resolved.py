"""``ResolvedPlan``: exact names in place of globs, all decided. The apply step executes it, reports show it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from torch import nn
from torch.distributed.tensor.placement_types import Placement

from shardwright.distributed.models.ties import Tie
from shardwright.distributed.runtime.local_arguments import ArgumentCut
from shardwright.distributed.styles import make_style
from shardwright.distributed.styles.base import Style

Origin = Literal["plan", "tie", "sequence parallelism", "slices", "adapter", "experts", "no rule"]


@dataclass(frozen=True)
class StyleUse:
    """The style of one module.

    Attributes:
        style: a name in :data:`shardwright.distributed.styles.STYLES`.
        options: what the style needs to know beyond its name.
        rule: the glob that gave it, or why it has this style where no glob did.
        origin: what gave it: a rule of the plan, a tie, the overlay of sequence parallelism, the dataflow (a module
            that works on slices), or nothing.
        region: name of the region whose input it reads or whose result it writes.
        sequence: under sequence parallelism, a reader directly below a block gathers for itself and a writer leaves its
            output split.
        inside: the module is a part of an adapted layer, which reads and writes for it.
    """

    style: str
    options: Mapping[str, Any] = field(default_factory=dict)
    rule: str = ""
    origin: Origin = "plan"
    region: str | None = None
    sequence: bool = False
    inside: bool = False

    @cached_property
    def made(self) -> Style:
        """The style itself, which states its facts."""
        made = make_style(self.style, **self.options)
        made.inside = self.inside
        return made

    @property
    def reads(self) -> bool:
        """Whether the module itself reads its region's input."""
        return self.made.reads and not self.inside

    @property
    def writes(self) -> bool:
        """Whether the module itself ends its region."""
        return self.made.writes and not self.inside


@dataclass(frozen=True)
class RegionUse:
    """A region; ``block`` names the sequence-parallel block it is in, if any."""

    block: str | None = None
    direct: bool = False


@dataclass
class ResolvedPlan:
    """A plan that has been matched to a model and a tensor-parallel size, and found to work.

    Attributes:
        modules: module name -> its style, for every module that owns parameters or has a style.
        parameters: (module name, parameter name) -> style name, for bare parameters with a style of their own.
        regions: module name -> its region.
        blocks: the sequence-parallel blocks.
        whole_blocks: blocks that stay on the whole sequence in a model where others do not.
        replicated: module name -> its parameters that are not cut.
        summed: module name -> those whose gradient is a sum over the ranks.
        attributes: module name -> attribute values that are rank-local from now on.
        arguments: module name -> tensor arguments that are cut to this rank's heads.
        widths: module name -> the argument whose width its code sees divided by the size.
        heads: the numbers of attention heads that layers have.
        ties: parameters that several modules share.
        notes: sentences for the report.
        warnings: sentences that a user should act on.
    """

    source: str
    tp: int
    sequence_parallel: bool
    modules: dict[str, StyleUse] = field(default_factory=dict)
    parameters: dict[tuple[str, str], str] = field(default_factory=dict)
    regions: dict[str, RegionUse] = field(default_factory=dict)
    blocks: list[str] = field(default_factory=list)
    whole_blocks: list[str] = field(default_factory=list)
    replicated: dict[str, tuple[str, ...]] = field(default_factory=dict)
    summed: dict[str, tuple[str, ...]] = field(default_factory=dict)
    attributes: dict[str, dict[str, int]] = field(default_factory=dict)
    arguments: dict[str, tuple[ArgumentCut, ...]] = field(default_factory=dict)
    widths: dict[str, str] = field(default_factory=dict)
    heads: list[int] = field(default_factory=list)
    ties: list[Tie] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def placement(self, name: str, module: nn.Module, own: str) -> Placement:
        """Where the parameter ``own`` of the module called ``name`` goes on the ``tp`` axis."""
        bare = self.parameters.get((name, own))
        style = make_style(bare) if bare is not None else self.modules[name].made
        return style.placement(module, own)

    def is_styled(self, fact: Callable[[Style], bool]) -> Callable[[str], bool]:
        """Whether a module of a given name has a style with this fact."""

        def check(name: str) -> bool:
            use = self.modules.get(name)
            return use is not None and fact(use.made)

        return check
