"""``ParallelConfig``: everything that decides how a model is spread, as plain data.

Standard library only (YAML text is parsed with PyYAML when asked for), so a config can be read, checked and
compared on a machine without torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from math import lcm, prod
from typing import TYPE_CHECKING, Any

from shardwright.distributed.axes import AVERAGED, DATA, FLATTENED, FOLDED, NAMES, SHARDED
from shardwright.distributed.fields import Named, check_type, one_of, only_known
from shardwright.distributed.precision import Precision, precision_of
from shardwright.errors import ConfigError
from shardwright.untrusted import parse_json, parse_yaml, shown

ENGINES = ("fsdp2", "megatron_fsdp")
CHECKPOINTING_MODES = ("none", "full", "selective")
EVERY = re.compile(r"every_([1-9]\d*)")
SELECTIVE = re.compile(r"selective(?:_([1-9]\d*))?")
CONTEXT_METHODS = ("gather", "ulysses", "auto")
RESHARDING = ("default", "always", "never")
PLAN_FILES = (".yaml", ".yml", ".json")
# The settings that the other engine does not have.
FSDP2_ONLY = (
    "ep", "loss_tiles", "mlp_tiles", "offload_activations", "reshard_after_forward", "keep_gathered_gib", "shard_ends",
    "prefetch",
)  # fmt: skip

if TYPE_CHECKING:

    class _Precision:
        """To a type checker: given as a name, a mapping or a :class:`Precision`, and read as the last."""

        def __get__(self, config: object, owner: type | None = None) -> Precision: ...
        def __set__(self, config: object, value: Precision | str | Mapping[str, str]) -> None: ...
else:
    _Precision = Precision


def saved_every(mode: str) -> int:
    """``ParallelConfig.products_saved_every`` of a way of activation checkpointing."""
    found = SELECTIVE.fullmatch(mode)
    return 0 if found is None else int(found[1] or 1)


@dataclass(frozen=True)
class Degrees:
    """How many ranks each mesh axis has, all known. ``world_size`` is the product of all but ``ep``.

    A field for each axis of :data:`shardwright.distributed.axes.AXES`. ``ep`` folds the ranks of ``dp_shard x
    cp x tp`` anew.
    """

    dp_replicate: int
    dp_shard: int
    cp: int
    tp: int
    ep: int = 1

    @property
    def world_size(self) -> int:
        return ranks_along(self, NAMES)

    @property
    def data_ranks(self) -> int:
        """How many ranks are given a batch of their own."""
        return ranks_along(self, FLATTENED[DATA])


@dataclass(frozen=True)
class ParallelConfig(Named):
    """How a model is spread over the ranks.

    Attributes:
        dp_replicate: replicas of the sharded model (HSDP when > 1).
        dp_shard: ranks the parameters, gradients and optimizer state are sharded over; -1 takes what is left.
        cp: context-parallel ranks (each holds a part of every sequence).
        tp: tensor-parallel ranks (each holds a part of every matrix).
        ep: expert-parallel ranks (each holds a part of the experts of every layer). No further factor of the world
            size: they are taken from the ranks of ``dp_shard x cp x tp``, whose number must be a multiple of it.
        context_method: how attention sees all positions with ``cp``: ``"gather"`` (keys and values), ``"ulysses"``
            (parts of the sequence are exchanged for parts of the heads; refused where these do not divide), or
            ``"auto"`` (``ulysses`` in the layers where they do).
        sequence_parallel: keep the residual stream split along the sequence over the ``tp`` ranks.
        engine: ``"fsdp2"`` or ``"megatron_fsdp"``.
        precision: dtypes of a step; ``"model"`` (nothing is cast: the step computes in the dtype of the parameters),
            ``"float32"`` and ``"bf16"`` are accepted as short forms.
        activation_checkpointing: ``"none"``, ``"full"`` (recompute every block), ``"every_2"`` (every second block; any
            number), ``"selective"`` (save the matrix products, recompute the rest) or ``"selective_2"`` (save every
            second matrix product; any number).
        compile: compile every block on its own with ``torch.compile``: true for its default backend, or the name of
            another. The compiler then does what ``"selective"`` checkpointing does, and better.
        reshard_after_forward: which blocks FSDP2 frees after forward and gathers again in backward. ``"default"``: all
            but the last of each list, and those that ``keep_gathered_gib`` keeps; ``"always"``: all; ``"never"``: none.
        keep_gathered_gib: GiB per rank that blocks may take which stay gathered between forward and backward: as many
            of the last as fit. The last block of a list counts, and stays in any case.
        loss_tiles: into how many tiles the tokens of a call with labels are cut, so that its logits are never whole.
            The ``logits`` that such a call returns cannot be used.
        mlp_tiles: in how many tiles of the sequence the MLPs of the blocks are computed, forward and backward, so that
            what they make inside is never whole.
        offload_activations: let the inputs of the recomputed blocks wait for backward in host memory.
        shard_ends: make the input embedding and the head FSDP2 units of their own, gathered when they run and not for
            the whole step. Not for tied ones, nor for models that read these weights without calling them.
        prefetch: how many blocks ahead FSDP2 gathers, in forward and in backward. 1 is what torch does by itself.
        plan: a tensor-parallel plan to use instead of the one Shardwright would choose: a YAML file written by
            ``shardwright plan --save``, or a dotted path to a dict or a function. None: choose.

    Raises:
        ConfigError: a value that can never work, whatever the world size.
    """

    dp_replicate: int = 1
    dp_shard: int = -1
    cp: int = 1
    tp: int = 1
    ep: int = 1
    context_method: str = "gather"
    sequence_parallel: bool = False
    engine: str = "fsdp2"
    precision: _Precision = field(default_factory=Precision)  # type: ignore[assignment]
    activation_checkpointing: str = "none"
    compile: bool | str = False
    reshard_after_forward: str = "default"
    keep_gathered_gib: float = 0.0
    loss_tiles: int = 1
    mlp_tiles: int = 1
    offload_activations: bool = False
    shard_ends: bool = False
    prefetch: int = 1
    plan: str | None = None

    def __post_init__(self) -> None:
        one_of("engine", self.engine, ENGINES)
        one_of("context_method", self.context_method, CONTEXT_METHODS)
        one_of("reshard_after_forward", self.reshard_after_forward, RESHARDING)
        mode = self.activation_checkpointing
        if not (
            isinstance(mode, str)
            and (mode in CHECKPOINTING_MODES or EVERY.fullmatch(mode) or SELECTIVE.fullmatch(mode))
        ):
            allowed = ", ".join(CHECKPOINTING_MODES)
            raise ConfigError(
                f"activation_checkpointing is {shown(mode)}; it must be one of {allowed}, or every_2, every_3 ... "
                "or selective_2, selective_3 ..."
            )
        if not isinstance(self.compile, bool | str) or self.compile == "":
            raise ConfigError(
                f"compile is {shown(self.compile)}; it must be true, false, or the name of a torch.compile backend."
            )
        for each in fields(self):
            check_type(each, getattr(self, each.name))
        self._check_activations()
        self._check_resharding()
        object.__setattr__(self, "precision", precision_of(self.precision))

    def _check_activations(self) -> None:
        mode = self.activation_checkpointing
        if self.products_saved_every > 1 and self.compile:
            raise ConfigError(
                f"activation_checkpointing is {mode!r}, but compile is {shown(self.compile)}: a compiled block chooses "
                "by itself what to keep. Set activation_checkpointing to selective, full or every_2 ..., or leave "
                "compile out."
            )
        if self.mlp_tiles > 1 and self.products_saved_every:
            raise ConfigError(
                f"mlp_tiles is {self.mlp_tiles}, but activation_checkpointing {mode!r} keeps the matrix products of "
                "the whole sequence, which tiles are there to avoid. Set activation_checkpointing to full, every_2 ... "
                "or none, or leave mlp_tiles out."
            )
        if self.offload_activations and (mode == "none" or self.products_saved_every):
            raise ConfigError(
                f"offload_activations moves the inputs of recomputed blocks, and activation_checkpointing {mode!r} "
                "recomputes none from its input. Set activation_checkpointing to full, or every_2 ..., or leave "
                "offload_activations out."
            )

    def _check_resharding(self) -> None:
        budget = self.keep_gathered_gib
        if budget and self.reshard_after_forward != "default":
            raise ConfigError(
                f"keep_gathered_gib is {budget}, which reshard_after_forward {self.reshard_after_forward!r} leaves no "
                'choice to. Set reshard_after_forward to "default", or leave keep_gathered_gib out.'
            )
        defaults = {field.name: field.default for field in fields(self)}
        chosen = {name: getattr(self, name) for name in FSDP2_ONLY if getattr(self, name) != defaults[name]}
        changed = [f"{name} ({shown(value)})" for name, value in chosen.items()]
        if changed and self.engine != "fsdp2":
            raise ConfigError(f"{', '.join(changed)} is for the engine fsdp2; {self.engine} has no such setting.")

    @property
    def parameter_ranks(self) -> int:
        """Over how many ranks FSDP2 shards all but experts; ``dp_shard`` is filled in."""
        return ranks_along(self, FLATTENED[SHARDED])

    @property
    def data_ranks(self) -> int:
        """How many ranks are given a batch of their own; ``dp_shard`` is filled in."""
        return ranks_along(self, FLATTENED[DATA])

    @property
    def averaging_ranks(self) -> int:
        """Over how many ranks FSDP2 averages gradients; ``dp_shard`` is filled in."""
        return ranks_along(self, FLATTENED[AVERAGED])

    @property
    def products_saved_every(self) -> int:
        """1 where recomputed blocks keep every matrix product, 2 where every second one ...; 0 where they keep none."""
        return saved_every(self.activation_checkpointing)

    @property
    def checkpointed_every(self) -> int:
        """1 where every block is recomputed, 2 where every second one is ...; 0 where none is.

        A compiled block chooses by itself what to keep, as ``"selective"`` does.
        """
        if found := EVERY.fullmatch(self.activation_checkpointing):
            return int(found[1])
        chooses = self.activation_checkpointing == "selective" and bool(self.compile)
        return 0 if chooses or self.activation_checkpointing == "none" else 1

    def degrees(self, world_size: int) -> Degrees:
        """The size of every axis for ``world_size`` ranks.

        Raises:
            ConfigError: the product of the degrees cannot be ``world_size``; the message shows every factor.
        """
        degrees = {name: getattr(self, name) for name in NAMES}
        given = {name: size for name, size in degrees.items() if size != -1}
        if self.dp_shard == -1:
            degrees["dp_shard"], rest = divmod(world_size, prod(given.values()))
            if rest or degrees["dp_shard"] == 0:
                fixed = prod(given.values())
                raise ConfigError(
                    f"{_product(given)} does not divide the world size {world_size}, so no dp_shard fits. Start a "
                    f"multiple of {fixed} ranks, or change one of them."
                )
        if prod(degrees.values()) != world_size:
            raise ConfigError(
                f"{_product(degrees)}, but the world size is {world_size}. Set dp_shard to -1 to take what is left, "
                f"or start {prod(degrees.values())} ranks."
            )
        folded = {name: degrees[name] for name in FOLDED}
        if prod(folded.values()) % self.ep:
            raise ConfigError(
                f"ep is {self.ep}, and its ranks are taken from {_product(folded)}, which it does not divide. Choose "
                "an ep that does."
            )
        return Degrees(**degrees, ep=self.ep)

    @property
    def least_world_size(self) -> int:
        """The smallest number of ranks this config can run on."""
        return self.least_dp_shard * ranks_along(self, (name for name in NAMES if name != "dp_shard"))

    @property
    def least_dp_shard(self) -> int:
        """The smallest ``dp_shard`` that this config can run with: enough for its experts, where it says -1."""
        if self.dp_shard != -1:
            return self.dp_shard
        others = ranks_along(self, (name for name in FOLDED if name != "dp_shard"))
        return lcm(others, self.ep) // others

    @property
    def compile_backend(self) -> str | None:
        """The ``torch.compile`` backend, None where nothing is compiled."""
        return {True: "inductor", False: None}[self.compile] if isinstance(self.compile, bool) else self.compile

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def to_yaml(self) -> str:
        import yaml

        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ParallelConfig:
        """The config described by ``data``; raises ConfigError on a key that does not exist."""
        if not isinstance(data, Mapping):
            raise ConfigError(f"A parallel config must be a mapping of keys to values, not {shown(data)}.")
        only_known(cls, data)
        return cls(**data)

    @classmethod
    def from_json(cls, text: str) -> ParallelConfig:
        return cls._from_file(parse_json(text, "The parallel config", ConfigError))

    @classmethod
    def from_yaml(cls, text: str) -> ParallelConfig:
        data = parse_yaml(text, "The parallel config", ConfigError)
        return cls._from_file({} if data is None else data)

    @classmethod
    def _from_file(cls, data: Any) -> ParallelConfig:
        config = cls.from_dict(data)
        if runs_code(config.plan):
            raise ConfigError(
                f"plan is {shown(config.plan)}, which names Python code. A config that is read from a text does not "
                "run code: pass it with with_(plan=...), or save the plan as YAML and name that file."
            )
        return config

    def with_(self, **changes: Any) -> ParallelConfig:
        """A copy with some fields changed."""
        return replace(self, **changes)


def ranks_along(degrees: ParallelConfig | Degrees, axes: Iterable[str]) -> int:
    """The product of the degrees of some mesh axes."""
    return prod(getattr(degrees, name) for name in axes)


def runs_code(plan: str | None) -> bool:
    """Whether a plan is a dotted path, whose module is imported, and not a file."""
    return plan is not None and not plan.endswith(PLAN_FILES)


def _product(degrees: Mapping[str, int]) -> str:
    return f"{' x '.join(f'{name} ({size})' for name, size in degrees.items())} = {prod(degrees.values())}"
