"""Reading the files of devices and fabrics."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from math import exp, inf, log
from pathlib import Path
from typing import Any

from shardwright.errors import ConfigError
from shardwright.untrusted import YAML_BYTES, parse_yaml, read_file, shown

_FOLDER = Path(__file__).parent
_FILES = (".yaml", ".yml")


@dataclass(frozen=True)
class Efficiencies:
    """The shares of their peaks that kernels reach.

    Attributes:
        matmul: of the dense peak, for large products.
        attention: of the dense peak, forward.
        attention_backward: of the dense peak.
        memory: of the memory bandwidth.
        fused: the share of the bytes of memory-bound kernels that is left where blocks are compiled.
        launch_us: microseconds of the host for each kernel.
        products: ``(floating-point operations, share of the dense peak)`` of products that were measured, the smallest
            first; None: all are taken to reach ``matmul``.
    """

    matmul: float
    attention: float
    attention_backward: float
    memory: float
    fused: float
    launch_us: float
    products: Sequence[Sequence[float]] | None = None

    def of_product(self, flops: float) -> float:
        """The share of the peak that a product of so many operations reaches.

        Between two that were measured the logarithms count; beyond the largest all reach what it does.
        """
        if not self.products:
            return self.matmul
        sizes = [log(size) for size, _ in self.products]
        shares = [log(share) for _, share in self.products]
        at = log(flops)
        above = next((place for place, size in enumerate(sizes) if size >= at), len(sizes))
        if above in (0, len(sizes)):
            return exp(shares[min(above, len(sizes) - 1)])
        low, high = above - 1, above
        part = (at - sizes[low]) / (sizes[high] - sizes[low])
        return exp(shares[low] + part * (shares[high] - shares[low]))


@dataclass(frozen=True)
class Device:
    """One kind of accelerator.

    Attributes:
        memory_mib: what the driver shows.
        teraflops: dense peak by dtype.
        memory_gb_per_s: of its own memory.
        fabric: that joins the devices of a node.
        gpus_per_node: how many there are.
        source: where the numbers come from.
        efficiencies: measured on this device; None: those of the package.
        dollars_per_hour: for one device; None where nobody said.
    """

    name: str
    memory_mib: int
    teraflops: Mapping[str, float]
    memory_gb_per_s: float
    fabric: str
    gpus_per_node: int
    source: str
    efficiencies: Efficiencies | None = None
    dollars_per_hour: float | None = None

    @property
    def memory(self) -> int:
        """Bytes."""
        return self.memory_mib * 2**20

    def peak(self, dtype: str) -> float:
        """Floating-point operations a second of dense products; float32 products run in full precision."""
        return self.teraflops.get(dtype, self.teraflops["float32"]) * 1e12


@dataclass(frozen=True)
class Fabric:
    """What joins devices.

    Attributes:
        gb_per_s: of one device, in one direction.
        latency_us: of one step of a ring.
        efficiency: the share of ``gb_per_s`` that large collectives reach.
        source: where the numbers come from.
        pairwise: of how many devices every two are joined by links of their own, which ``gb_per_s`` is the sum of; None
            where a switch gives all of it to any group.
    """

    name: str
    gb_per_s: float
    latency_us: float
    efficiency: float
    source: str
    pairwise: int | None = None


@dataclass(frozen=True)
class Machine:
    """A device, and the fabrics inside and between nodes."""

    key: str
    device: Device
    inside: Fabric
    between: Fabric
    efficiencies: Efficiencies


def known_devices() -> list[str]:
    """The names that :func:`load_machine` knows."""
    return sorted(path.stem for path in (_FOLDER / "devices").glob("*.yaml"))


def known_machine(name: str) -> Machine | None:
    """The machine with the device that torch calls ``name``; None where no file describes it."""
    for device in known_devices():
        machine = load_machine(device)
        if machine.device.name.partition(" (")[0] == name:  # what stands in brackets is not the driver's
            return machine
    return None


def load_machine(device: str, *, network: str = "ib-ndr", gpus_per_node: int | None = None) -> Machine:
    """A device by name, or by the path of a file of the same form.

    Args:
        network: the fabric between nodes, by name or path.
        gpus_per_node: instead of the device's own.

    Raises:
        ConfigError: there is no such device or fabric, or its file is not of that form.
    """
    found = _device(device)
    if gpus_per_node is not None:
        found = replace(found, gpus_per_node=gpus_per_node)
    own = found.efficiencies
    inside = found.fabric
    if inside.endswith(_FILES) and device.endswith(_FILES):  # a file beside that of the device
        inside = str(Path(device).parent / inside)
    efficiencies = own if own is not None else _made(Efficiencies, _read(_FOLDER / "efficiencies.yaml"), "efficiencies")
    return Machine(Path(device).stem, found, load_fabric(inside), load_fabric(network), efficiencies)


def _device(name: str) -> Device:
    data = _read(_path("devices", name))
    if isinstance(data.get("efficiencies"), Mapping):
        data["efficiencies"] = _made(Efficiencies, data["efficiencies"], name)
    return _made(Device, data, name)


def load_fabric(name: str) -> Fabric:
    """A fabric by name, or by the path of a file of the same form.

    Raises:
        ConfigError: there is no such fabric, or its file is not of that form.
    """
    return _made(Fabric, _read(_path("fabrics", name)), name)


def _path(kind: str, name: str) -> Path:
    if name.endswith(_FILES):
        if not Path(name).is_file():
            raise ConfigError(f"There is no file {name} (looked from {Path.cwd()}).")
        return Path(name)
    path = _FOLDER / kind / f"{name}.yaml"
    if not path.is_file():
        known = sorted(each.stem for each in (_FOLDER / kind).glob("*.yaml"))
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise ConfigError(
            f"There is no {kind[:-1]} {name!r}.{hint} Known: {', '.join(known)}. For another one pass the path of a "
            "YAML file with the same keys."
        )
    return path


def _read(path: Path) -> dict[str, Any]:
    data = parse_yaml(read_file(path, ConfigError, YAML_BYTES), str(path), ConfigError)
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must be a mapping of keys to values.")
    return data


def _made(cls: type[Any], data: Mapping[str, Any], name: str) -> Any:
    known = {field.name for field in fields(cls)}
    if unknown := set(data) - known:
        told = ", ".join(map(shown, sorted(unknown, key=str)))
        raise ConfigError(f"{name} has unknown key(s) {told}; known: {', '.join(sorted(known))}.")
    for field in fields(cls):
        if field.name in data:
            _require_kind(data[field.name], str(field.type), f"{field.name} in {name}")
    try:
        return cls(**data)
    except TypeError as error:
        raise ConfigError(f"{name} lacks keys that a {cls.__name__.lower()} needs: {error}.") from error


def _require_kind(value: Any, kind: str, what: str) -> None:
    """Raises ConfigError unless ``value`` is of the type that a field is annotated with; numbers are finite."""
    if kind == "Mapping[str, float]":
        if not isinstance(value, Mapping) or "float32" not in value:
            raise ConfigError(f"{what} is {shown(value)}; it must be a mapping of dtypes, float32 among them.")
        for key, number in value.items():
            _require_kind(number, "float", f"{shown(key)} of {what}")
    elif kind == "Sequence[Sequence[float]] | None":
        pairs = value if isinstance(value, list) else [value]
        if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
            raise ConfigError(f"{what} is {shown(value)}; it must be a list of pairs: operations, share of the peak.")
        for number in (number for pair in pairs for number in pair):
            _require_kind(number, "float", what)
    elif kind == "str" and not isinstance(value, str):
        raise ConfigError(f"{what} is {shown(value)}; it must be text.")
    elif kind in ("int", "int | None", "float", "float | None") and not (value is None and "None" in kind):
        number_ = int if kind.startswith("int") else (int, float)
        least_is_0 = what.partition(" ")[0].endswith(("_us", "_per_hour"))
        if (
            isinstance(value, bool)
            or not isinstance(value, number_)
            or not (0 < value < inf or (least_is_0 and value == 0))
        ):
            raise ConfigError(f"{what} is {shown(value)}; it must be a finite number above 0.")
