"""``ParallelPlan``: which style every module gets, as plain data.

Standard library only, so that a plan can be printed, compared, saved and edited on any machine. Whether it fits a
model is decided later, by :mod:`shardwright.distributed.planning.resolve`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from shardwright.errors import PlanError
from shardwright.untrusted import parse_json, parse_yaml, shown

_KEYS = ("styles", "optional", "local_attributes", "local_arguments", "source", "tp", "notes")


@dataclass(frozen=True)
class ParallelPlan:
    """Styles for the modules and bare parameters of a model.

    Attributes:
        styles: glob over module (or parameter) names -> style name. ``*`` stands for one name between two dots. Where
            several globs match one module, the last one wins. ``replicate`` declares a module whole on purpose.
        optional: the globs among ``styles`` that may match nothing; any other glob that does is an error.
        local_attributes: glob over module names -> names of integer attributes that the module's code reads as sizes (a
            head count, a width) and that become rank-local: they are divided by the tensor-parallel size, on the
            instance, never in the shared config.
        local_arguments: glob over module names -> tensor arguments of the module's forward that are cut to this rank's
            heads, as ``name:dim:heads``: the dim's entries come in groups of ``heads``. ``name:width``: an argument
            that column-parallel layers read whole, and whose last dim the module's own code sees divided by the size.
        source: where the plan comes from, for reports (``"custom"``, ``"optimized: qwen3"``, ``"huggingface"``, ...).
        tp: the only tensor-parallel size that the plan is for; None where it suits any that divides the model's heads.
        notes: sentences for the reader of a report, for example what falls back to a gather and what that costs.
    """

    styles: Mapping[str, str]
    optional: frozenset[str] = frozenset()
    local_attributes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    local_arguments: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    source: str = "custom"
    notes: tuple[str, ...] = field(default=())
    tp: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.styles, Mapping):
            raise PlanError(f"styles must be a mapping of globs to style names, not {type(self.styles).__name__}.")
        for glob, style in self.styles.items():
            if not isinstance(glob, str) or not glob or glob != glob.strip():
                raise PlanError(f"{shown(glob)} is not a glob over module names.")
            if not isinstance(style, str) or not style:
                raise PlanError(f"The style of {shown(glob)} is {shown(style)}; it must be a style name.")
        _require_strings("optional", self.optional)
        _require_strings("notes", self.notes)
        stray = sorted(set(self.optional) - set(self.styles))
        if stray:
            raise PlanError(f"optional names {', '.join(map(repr, stray))}, which styles does not have.")
        if self.tp is not None and (not isinstance(self.tp, int) or isinstance(self.tp, bool) or self.tp < 1):
            raise PlanError(f"tp is {shown(self.tp)}; it must be a whole number >= 1, or left out.")
        if not isinstance(self.source, str):
            raise PlanError(f"source is {shown(self.source)}; it must be a string.")
        object.__setattr__(self, "styles", dict(self.styles))
        object.__setattr__(self, "optional", frozenset(self.optional))
        for key in ("local_attributes", "local_arguments"):
            object.__setattr__(self, key, _lists_by_glob(key, getattr(self, key)))
        object.__setattr__(self, "notes", tuple(self.notes))

    def __repr__(self) -> str:
        """The same in every process for equal plans, since ranks compare it; a set has another order in each."""
        return f"{type(self).__name__}({self.to_dict()})"

    def to_dict(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "tp": self.tp,
            "styles": dict(self.styles),
            "optional": sorted(self.optional),
            "local_attributes": {glob: list(names) for glob, names in self.local_attributes.items()},
            "local_arguments": {glob: list(names) for glob, names in self.local_arguments.items()},
            "notes": list(self.notes),
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def to_yaml(self) -> str:
        import yaml

        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ParallelPlan:
        """The plan described by ``data``; raises PlanError on a key or a value that does not fit."""
        if not isinstance(data, Mapping):
            raise PlanError(f"A plan must be a mapping with the keys {', '.join(_KEYS)}, not {type(data).__name__}.")
        unknown = sorted(set(data) - set(_KEYS), key=str)
        if unknown:
            raise PlanError(f"Unknown key(s) {', '.join(map(shown, unknown))} in a plan. Known: {', '.join(_KEYS)}.")
        if "styles" not in data:
            raise PlanError("A plan needs the key 'styles': a mapping of globs over module names to style names.")
        return cls(**data)

    @classmethod
    def from_json(cls, text: str | bytes) -> ParallelPlan:
        return cls.from_dict(parse_json(text, "The plan", PlanError))

    @classmethod
    def from_yaml(cls, text: str | bytes) -> ParallelPlan:
        return cls.from_dict(parse_yaml(text, "The plan", PlanError))

    def diff(self, other: ParallelPlan) -> list[str]:
        """One line per glob on which the two plans differ: ``- glob: style`` is here only, ``+ glob: style`` there."""
        lines = []
        for glob in dict.fromkeys([*self._globs(), *other._globs()]):
            here, there = self._entry(glob), other._entry(glob)
            if here == there:
                continue
            if here is not None:
                lines.append(f"- {glob}: {here}")
            if there is not None:
                lines.append(f"+ {glob}: {there}")
        return lines

    def _globs(self) -> list[str]:
        return list(dict.fromkeys([*self.styles, *self.local_attributes, *self.local_arguments]))

    def _entry(self, glob: str) -> str | None:
        local = [*self.local_attributes.get(glob, ()), *self.local_arguments.get(glob, ())]
        parts = [self.styles.get(glob), f"local {', '.join(local)}" if local else None]
        return "; ".join(part for part in parts if part) or None

    def __str__(self) -> str:
        globs = self._globs()
        width = max((len(glob) for glob in globs), default=0)
        lines = [f"plan from {self.source}"]
        lines += [f"  {glob:<{width}}  {self._entry(glob)}" for glob in globs]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def merge_plans(plans: Mapping[str, ParallelPlan]) -> ParallelPlan:
    """One plan for a model from those of models inside of it.

    Args:
        plans: name of an inner model -> its plan, whose globs are relative to it.
    """

    def below(key: str) -> dict[str, Any]:
        return {f"{name}.{glob}": value for name, plan in plans.items() for glob, value in getattr(plan, key).items()}

    return ParallelPlan(
        below("styles"),
        frozenset(f"{name}.{glob}" for name, plan in plans.items() for glob in plan.optional),
        below("local_attributes"),
        below("local_arguments"),
        source=" and ".join(dict.fromkeys(plan.source for plan in plans.values())),
        notes=tuple(dict.fromkeys(note for plan in plans.values() for note in plan.notes)),
        tp=next((plan.tp for plan in plans.values() if plan.tp is not None), None),
    )


def _require_strings(name: str, values: Iterable[Any]) -> None:
    if isinstance(values, str) or not isinstance(values, Iterable) or any(not isinstance(v, str) for v in values):
        raise PlanError(f"{name} must be a list of strings, not {shown(values)}.")


def _lists_by_glob(key: str, value: Any) -> dict[str, tuple[str, ...]]:
    if not isinstance(value, Mapping):
        raise PlanError(f"{key} must be a mapping of globs over module names to lists of names.")
    for glob, names in value.items():
        _require_strings(f"The globs of {key}", [glob])
        _require_strings(f"{key} of {shown(glob)}", names)
    return {glob: tuple(names) for glob, names in value.items()}


def glob_to_regex(glob: str) -> re.Pattern[str]:
    """The regular expression of a glob over dotted names. ``*`` never crosses a dot."""
    first, *parts = (re.escape(part) for part in glob.split("*"))
    if not parts:
        return re.compile(first)
    # What lies between two stars is taken where it first occurs, and not tried again: time linear in the name.
    between = "".join(f"(?>[^.]*?{part})" for part in parts[:-1])
    return re.compile(f"{first}{between}[^.]*{parts[-1]}")


def match_names(glob: str, names: Iterable[str]) -> list[str]:
    """The ``names`` that ``glob`` matches, in their order."""
    pattern = glob_to_regex(glob)
    return [name for name in names if pattern.fullmatch(name)]
