"""Parameters that several modules share."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Tie:
    """One parameter under several names: ``(module name, parameter name)`` each, in the model's order."""

    places: tuple[tuple[str, str], ...]

    @property
    def names(self) -> list[str]:
        return [f"{module}.{parameter}" if module else parameter for module, parameter in self.places]


def find_ties(model: nn.Module) -> list[Tie]:
    """The parameters that more than one module holds."""
    places: dict[int, list[tuple[str, str]]] = {}
    for module_name, module in model.named_modules():
        for name, param in module._parameters.items():
            if param is not None:
                places.setdefault(id(param), []).append((module_name, name))
    return [Tie(tuple(found)) for found in places.values() if len(found) > 1]


def restore_ties(model: nn.Module, ties: list[Tie]) -> None:
    """Make the modules of each tie share one parameter again: that of the first."""
    for tie in ties:
        first, name = tie.places[0]
        param = model.get_submodule(first)._parameters[name]
        for module, other in tie.places[1:]:
            model.get_submodule(module)._parameters[other] = param
