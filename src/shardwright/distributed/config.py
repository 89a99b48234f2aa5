"""``ParallelConfig``: everything that decides how a model is spread, as plain data.

Standard library only (YAML text is parsed with PyYAML when asked for), so a config can be read, checked and
compared on a machine without torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from math import inf, lcm, prod
from typing import TYPE_CHECKING, Any, Self

from shardwright.errors import ConfigError
from shardwright.settings import HasShortForms
from shardwright.untrusted import parse_json, parse_yaml, shown

ENGINES = ("fsdp2", "megatron_fsdp")
CHECKPOINTING_MODES = ("none", "full", "selective")
EVERY = re.compile(r"every_([1-9]\d*)")
SELECTIVE = re.compile(r"selective(?:_([1-9]\d*))?")
CONTEXT_METHODS = ("gather", "ulysses", "auto")
RESHARDING = ("default", "always", "never")
DTYPES = ("float32", "bfloat16", "float16")
MODEL = "model"
PLAN_FILES = (".yaml", ".yml", ".json")
# The settings that the other engine does not have.
FSDP2_ONLY = (
    "ep", "loss_tiles", "mlp_tiles", "offload_activations", "reshard_after_forward", "keep_gathered_gib", "shard_ends",
    "prefetch",
)  # fmt: skip


def _only_known(cls: Any, names: Iterable[Any]) -> None:
    known = {field.name for field in fields(cls)}
    unknown = sorted(set(names) - known, key=str)
    if unknown:
        raise ConfigError(
            f"Unknown key(s) {', '.join(map(shown, unknown))} for {cls.__name__}. Known: {', '.join(sorted(known))}."
        )


class _Named:
    """A dataclass that raises ConfigError for a field that it does not have, with the names of those that it has."""

    def __new__(cls, *args: Any, **values: Any) -> Self:
        _only_known(cls, values)
        return super().__new__(cls)


@dataclass(frozen=True)
class Precision(_Named, HasShortForms):
    """Dtypes of a training step. ``"model"`` is the dtype that the model's parameters have; by default nothing is cast.

    The dtype in which parameters, and with them an optimizer's state, are kept is the model's, and nothing here changes
    it.

    Attributes:
        param: dtype in which parameters are gathered and computed with.
        reduce: dtype in which gradients are summed over the data-parallel ranks.
        output: dtype of what the model returns.
    """

    param: str = MODEL
    reduce: str = MODEL
    output: str = MODEL

    def __post_init__(self) -> None:
        for name in ("param", "reduce", "output"):
            value = getattr(self, name)
            if value not in (MODEL, *DTYPES):
                allowed = ", ".join((MODEL, *DTYPES))
                raise ConfigError(f"precision.{name} is {shown(value)}; it must be one of {allowed}.")

    def settled(self, dtypes: Sequence[str]) -> Precision:
        """This precision for a model whose parameters are of ``dtypes``, the commonest first.

        Every ``"model"`` is replaced by the commonest. Where nothing is cast, the result is ``Precision()``.
        """
        if self == Precision() or not dtypes:
            return Precision()
        own = dtypes[0]
        named = Precision(*(own if dtype == MODEL else dtype for dtype in (self.param, self.reduce, self.output)))
        return Precision() if len(dtypes) == 1 and named == Precision(own, own, own) else named


FLOAT32 = Precision(param="float32", reduce="float32", output="float32")
BF16_MIXED = Precision(param="bfloat16", reduce="float32", output="float32")
PRECISIONS = {"model": Precision(), "float32": FLOAT32, "bf16": BF16_MIXED}

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

    ``ep`` folds the ranks of ``dp_shard x cp x tp`` anew (:mod:`shardwright.distributed.axes`).
    """

    dp_replicate: int
    dp_shard: int
    cp: int
    tp: int
    ep: int = 1

    @property
    def world_size(self) -> int:
        return self.dp_replicate * self.dp_shard * self.cp * self.tp


@dataclass(frozen=True)
class ParallelConfig(_Named):
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
        for name in ("dp_replicate", "dp_shard", "cp", "tp", "ep", "loss_tiles", "mlp_tiles", "prefetch"):
            _degree(name, getattr(self, name), least=-1 if name == "dp_shard" else 1)
        for name in ("sequence_parallel", "offload_activations", "shard_ends"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is {shown(getattr(self, name))}; it must be true or false.")
        if not isinstance(self.compile, bool) and not (isinstance(self.compile, str) and self.compile):
            raise ConfigError(
                f"compile is {shown(self.compile)}; it must be true, false, or the name of a torch.compile backend."
            )
        _one_of("engine", self.engine, ENGINES)
        _one_of("context_method", self.context_method, CONTEXT_METHODS)
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
        self._check_activations()
        self._check_resharding()
        if self.plan is not None and not isinstance(self.plan, str):
            raise ConfigError(f"plan is {shown(self.plan)}; it must be a path, a dotted name, or left out.")
        object.__setattr__(self, "precision", _precision(self.precision))

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
        _one_of("reshard_after_forward", self.reshard_after_forward, RESHARDING)
        budget = self.keep_gathered_gib
        if isinstance(budget, bool) or not isinstance(budget, int | float) or not 0 <= budget < inf:
            raise ConfigError(f"keep_gathered_gib is {shown(budget)}; it must be a number of GiB, 0 or more.")
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
        """Over how many ranks FSDP2 shards all but experts: ``dp_shard`` x ``cp``; the former is filled in."""
        return self.dp_shard * self.cp

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
        fixed = self.dp_replicate * self.cp * self.tp
        dp_shard = self.dp_shard
        if dp_shard == -1:
            dp_shard, rest = divmod(world_size, fixed)
            if rest or dp_shard == 0:
                raise ConfigError(
                    f"dp_replicate ({self.dp_replicate}) x cp ({self.cp}) x tp ({self.tp}) = {fixed} does not divide "
                    f"the world size {world_size}, so no dp_shard fits. Start a multiple of {fixed} ranks, or change "
                    "one of the three."
                )
        if fixed * dp_shard != world_size:
            raise ConfigError(
                f"dp_replicate ({self.dp_replicate}) x dp_shard ({dp_shard}) x cp ({self.cp}) x tp ({self.tp}) = "
                f"{fixed * dp_shard}, but the world size is {world_size}. Set dp_shard to -1 to take what is left, "
                f"or start {fixed * dp_shard} ranks."
            )
        if (dp_shard * self.cp * self.tp) % self.ep:
            raise ConfigError(
                f"ep is {self.ep}, and its ranks are taken from dp_shard ({dp_shard}) x cp ({self.cp}) x tp "
                f"({self.tp}) = {dp_shard * self.cp * self.tp}, which it does not divide. Choose an ep that does."
            )
        return Degrees(self.dp_replicate, dp_shard, self.cp, self.tp, self.ep)

    @property
    def least_world_size(self) -> int:
        """The smallest number of ranks this config can run on."""
        return prod((self.dp_replicate, self.least_dp_shard, self.cp, self.tp))

    @property
    def least_dp_shard(self) -> int:
        """The smallest ``dp_shard`` that this config can run with: enough for its experts, where it says -1."""
        if self.dp_shard != -1:
            return self.dp_shard
        others = self.cp * self.tp
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
        _only_known(cls, data)
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


def runs_code(plan: str | None) -> bool:
    """Whether a plan is a dotted path, whose module is imported, and not a file."""
    return plan is not None and not plan.endswith(PLAN_FILES)


def _degree(name: str, value: Any, *, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least or value == 0:
        allowed = "a whole number >= 1, or -1 for what is left" if least == -1 else "a whole number >= 1"
        raise ConfigError(f"{name} is {shown(value)}; it must be {allowed}.")


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} is {shown(value)}; it must be one of {', '.join(allowed)}.")


def _precision(value: Any) -> Precision:
    if isinstance(value, Precision):
        return value
    if isinstance(value, str):
        if value not in PRECISIONS:
            raise ConfigError(
                f"precision is {shown(value)}; it must be one of {', '.join(PRECISIONS)}, or a mapping with the keys "
                "param, reduce and output."
            )
        return PRECISIONS[value]
    if isinstance(value, Mapping):
        _only_known(Precision, value)
        return Precision(**value)
    raise ConfigError(f"precision is {shown(value)}; it must be a name or a mapping.")
