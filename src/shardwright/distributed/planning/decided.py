"""``DecidedPlan``: everything that is decided about how a model is sharded, as data.

The executors in :mod:`shardwright.distributed.apply` do what it says, a part each; ranks compare it before anything is
cut; the estimate, ``verify`` and reports read it. None of them decides anything.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from shardwright.distributed.plan import ParallelPlan
from shardwright.distributed.planning.context_plan import ContextPlan
from shardwright.distributed.planning.resolved import ResolvedPlan
from shardwright.distributed.runtime.expert_calls import Called
from shardwright.distributed.runtime.expert_loop import Loop

ROOT = ""


@dataclass(frozen=True)
class Unit:
    """What one ``fully_shard`` call owns.

    Attributes:
        modules: names; several where they hold the same parameters. :data:`ROOT` is the model itself.
        reshard_after_forward: whether its parameters are freed after forward, and gathered again in backward.
        apart: modules inside that are sharded by themselves first, because their parameters have another dtype.
        experts: whether it holds experts that are spread over ranks, which are sharded over the rest of the ranks.
        gathered_around: whether what runs around its modules gathers its parameters, rather than their forward.
    """

    modules: tuple[str, ...]
    reshard_after_forward: bool
    apart: tuple[str, ...] = ()
    experts: bool = False
    gathered_around: bool = False


@dataclass(frozen=True)
class Listed:
    """How experts that are modules of their own are called.

    Attributes:
        caller: the name of the module whose code calls them.
        loop: where they are below it.
        called: with what.
    """

    caller: str
    loop: Loop
    called: Called


@dataclass(frozen=True)
class Experts:
    """A module whose experts are spread over ranks.

    Attributes:
        count: how many there are on all ranks.
        kind: how it is called (:class:`shardwright._transformers.ExpertsCall`); ``"listed"`` for a list of experts,
            which is not called itself.
        arguments: what its forward calls what it is called with.
        parameters: the names, below it, of the parameters that have a row per expert, or several; of a list, all.
        listed: for a list of experts.
    """

    count: int
    kind: str
    arguments: tuple[str, ...]
    parameters: tuple[str, ...]
    listed: Listed | None = None


@dataclass(frozen=True)
class ExpertPlan:
    """Experts on ranks of their own.

    Attributes:
        ep: among how many ranks those of each module are spread; the last may have fewer.
        modules: by name.
    """

    ep: int
    modules: Mapping[str, Experts]

    @property
    def parameters(self) -> list[str]:
        """The names of all parameters that are spread."""
        return [f"{name}.{own}" for name, experts in self.modules.items() for own in experts.parameters]

    @property
    def exchanging(self) -> list[str]:
        """The names of the modules in whose forward tokens travel."""
        return [name if own.listed is None else own.listed.caller for name, own in self.modules.items()]


@dataclass(frozen=True)
class DataPlan:
    """FSDP2's units, in the order in which they are made: inner ones first, the root last.

    Attributes:
        prefetch: block -> the blocks that it gathers ahead in forward, and in backward. Empty where torch's own way,
            the next one, is wanted.
        order: the lists that units are in, in the order in which they run, as far as a run without weights shows it.
    """

    units: tuple[Unit, ...]
    prefetch: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = field(default_factory=dict)
    order: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """The names of all modules in units, without the root."""
        return [name for unit in self.units for name in unit.modules if name != ROOT]


@dataclass(frozen=True)
class Tiles:
    """What is computed a part at a time, and in how many parts.

    Attributes:
        head: the module whose logits are computed in ``loss`` tiles in a call with labels; None where they are whole.
        mlps: the modules that are computed in ``mlp`` tiles of the sequence.
    """

    head: str | None = None
    loss: int = 1
    mlps: tuple[str, ...] = ()
    mlp: int = 1


def innermost(name: str, units: Container[str]) -> str:
    """The innermost of ``units`` that the module called ``name`` is in or is; :data:`ROOT` where it is in none."""
    while name != ROOT and name not in units:
        name = name.rpartition(".")[0]
    return name


@dataclass(frozen=True)
class DecidedPlan:
    """The decisions.

    Attributes:
        plan: the tensor-parallel plan that applies, as a user can read, save and edit it; None where none is needed.
        tensor: what it means for this model; None with one tensor-parallel rank.
        data: FSDP2's units; None where FSDP2 has no part in it.
        experts: experts on ranks of their own; None where there are none.
        context: what runs on a part of the sequence; None with one context-parallel rank.
        blocks: the modules that can be gathered, recomputed or compiled one by one.
        recomputed: those that are recomputed in backward, ``activation_checkpointing`` says how.
        activation_checkpointing: ``ParallelConfig.activation_checkpointing``.
        offload: whether their inputs wait for backward in host memory.
        compiled: those that are compiled; :data:`ROOT` stands for a model that is compiled as one, which Shardwright
            never decides and an estimate of somebody else's run may say.
        compile_backend: of ``torch.compile``; None where nothing is compiled.
        summing: the modules that sum gradients of their replicated parameters by themselves, because they gather or
            repeat by themselves. All other parameters are summed together, once.
        tiles: what is computed a part at a time.
        readable: the modules whose weights losses read by themselves: the embedding and the head.
        notes: sentences for a reader.
        warnings: those among them that a user should act on.
    """

    plan: ParallelPlan | None
    tensor: ResolvedPlan | None
    data: DataPlan | None
    experts: ExpertPlan | None = None
    context: ContextPlan | None = None
    blocks: tuple[str, ...] = ()
    recomputed: tuple[str, ...] = ()
    activation_checkpointing: str = "none"
    offload: bool = False
    compiled: tuple[str, ...] = ()
    compile_backend: str | None = None
    summing: tuple[str, ...] = ()
    tiles: Tiles = Tiles()
    readable: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def compiled_whole(self) -> bool:
        """Whether the model is compiled as one."""
        return ROOT in self.compiled

    def to_dict(self) -> dict[str, Any]:
        """As plain data for a reader, but for ``plan`` and ``tensor``: a plan has a file format of its own."""
        shown = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("plan", "tensor")}
        return {**shown, "data": None if self.data is None else asdict(self.data), "tiles": asdict(self.tiles)}
