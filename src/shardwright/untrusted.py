"""Reading files that somebody else may have written: of bounded size and depth, and refused in one sentence.

Standard library and PyYAML only. Nothing here makes any object but numbers, text, lists and mappings.
"""

from __future__ import annotations

import json
import os
import reprlib
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shardwright.errors import ShardwrightError

JSON_BYTES = 64 * 2**20  # the index of a model of a trillion parameters has about 15 MB
YAML_BYTES = 256 * 2**10  # PyYAML needs seconds for more
DEPTH = 64  # of lists and mappings in each other
NODES = 50_000  # values in a YAML text, with those that aliases repeat
_INTEGER = 2**63

# What PyYAML raises on a scalar that is not of its tag's type, besides its own errors.
_BAD_SCALAR = (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError)

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 3, 120, 120, 40


def shown(value: Any) -> str:
    """``repr(value)``, cut to what fits in a sentence."""
    return _SHORT.repr(value)


def printable(text: str) -> str:
    """``text`` for a terminal: what would move its cursor or change its colours is written out."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def usable_path(text: str | Path, what: str, error: type[ShardwrightError]) -> Path:
    """``text`` as a path that the system can be asked about; ``~`` is expanded.

    Args:
        what: names it in the error, for example ``"output.dir"``.

    Raises:
        error: too long, a null character in it, or the home of a user that there is not.
    """
    try:
        path = Path(text).expanduser()
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return path  # whoever opens it says so
    except (OSError, RuntimeError, ValueError) as cause:
        raise error(f"{what} is {shown(str(text))}, which is no usable path: {_reason(cause)}.") from cause
    return path


def read_file(path: Path, error: type[ShardwrightError], limit: int = JSON_BYTES) -> bytes:
    """The content of a regular file of at most ``limit`` bytes.

    Raises:
        error: it cannot be read, is no regular file (reading from a pipe might never end), or is larger.
    """
    try:
        found = path.stat()
        data = None
        if stat.S_ISREG(found.st_mode):
            with path.open("rb") as file:
                data = file.read(limit + 1)
    except (OSError, ValueError) as cause:
        raise error(f"{path} cannot be read: {_reason(cause)}.") from cause
    if data is None:
        raise error(f"{path} is no regular file, so it is not read.")
    if len(data) > limit:
        raise error(f"{path} has {found.st_size:,} bytes; files of its kind are read up to {limit:,}.")
    return data


def read_json(path: Path, error: type[ShardwrightError], limit: int = JSON_BYTES) -> Any:
    """:func:`read_file` and :func:`parse_json`."""
    return parse_json(read_file(path, error, limit), str(path), error)


def parse_json(text: str | bytes, name: str, error: type[ShardwrightError]) -> Any:
    """The value of a JSON text.

    Args:
        name: of the file, for the error.

    Raises:
        error: not UTF-8, not JSON, nested deeper than 64 levels, an integer beyond 64 bits, text that is no Unicode.
    """
    try:
        data = json.loads(text)
    except RecursionError:
        raise error(f"{name} is nested deeper than {DEPTH} levels.") from None
    except UnicodeDecodeError as cause:
        raise error(f"{name} is not UTF-8 text (byte {cause.start}).") from None
    except ValueError as cause:  # JSONDecodeError, and Python's limit on the digits of an integer
        raise error(f"{name} is not valid JSON: {cause}.") from None
    check_values(data, name, error)
    return data


def parse_yaml(text: str | bytes, name: str, error: type[ShardwrightError]) -> Any:
    """The value of a YAML text; aliases count as what they repeat.

    Args:
        name: of the file, for the error.

    Raises:
        error: not YAML (the message has the line), larger than 256 KB, nested deeper than 64 levels, more than 50,000
            values, an alias inside of what it repeats, or a value that is no number, text, list or mapping.
    """
    import yaml

    if len(text) > YAML_BYTES:
        raise error(f"{name} has {len(text):,} bytes; YAML is read up to {YAML_BYTES:,}.")
    try:
        text = text.decode() if isinstance(text, bytes) else text
        _check_expansion(yaml.parse(text, Loader=yaml.SafeLoader), name, error)
        data = yaml.safe_load(text)
    except UnicodeDecodeError as cause:
        raise error(f"{name} is not UTF-8 text (byte {cause.start}).") from None
    except yaml.YAMLError as cause:
        raise error(f"{name} is not valid YAML: {' '.join(str(cause).split())}.") from None
    except ShardwrightError:
        raise
    except _BAD_SCALAR as cause:
        raise error(f"{name} has a value that does not fit its YAML tag: {_reason(cause)}.") from None
    check_values(data, name, error)
    return data


def _check_expansion(events: Iterator[Any], name: str, error: type[ShardwrightError]) -> None:
    """Whether the YAML behind ``events`` stays within the limits when its aliases are replaced by what they repeat."""
    import yaml

    open_nodes: list[tuple[str | None, int, int]] = []  # anchor, values before it, depth of what it holds
    sizes: dict[str, tuple[int, int] | None] = {}  # anchor -> values, depth; None while it is still open
    nodes, below = 0, 0
    for event in events:
        inside = 0
        if isinstance(event, yaml.AliasEvent):
            known = sizes.get(str(event.anchor), (0, 0))  # one that does not exist is PyYAML's to refuse
            if known is None:
                raise error(f"{name} has an alias, *{event.anchor}, inside of what it repeats.")
            nodes, inside = nodes + known[0], known[1]
        elif isinstance(event, yaml.ScalarEvent):
            nodes += 1
            if event.anchor:
                sizes[event.anchor] = (1, 0)
        elif isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, nodes, below))
            nodes, below = nodes + 1, 0
            if event.anchor:
                sizes[event.anchor] = None
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before, outside = open_nodes.pop()
            inside = below + 1
            if anchor:
                sizes[anchor] = (nodes - before, inside)
            below = outside
        else:
            continue
        below = max(below, inside)
        if len(open_nodes) + inside > DEPTH:
            raise error(f"{name} is nested deeper than {DEPTH} levels.")
        if nodes > NODES:
            raise error(f"{name} has more than {NODES:,} values, those that aliases repeat counted.")


def check_values(data: Any, name: str, error: type[ShardwrightError]) -> None:
    """Whether ``data``, as JSON or YAML gave it, holds nothing that trips those who use it.

    Raises:
        error: too deep, an integer beyond 64 bits, text that is no Unicode, or another kind of value (a YAML date).
    """
    waiting = [(data, 0)]
    while waiting:
        value, depth = waiting.pop()
        if isinstance(value, dict | list):
            if depth >= DEPTH:
                raise error(f"{name} is nested deeper than {DEPTH} levels.")
            inside = value if isinstance(value, list) else [*value.keys(), *value.values()]
            waiting += [(one, depth + 1) for one in inside]
        elif isinstance(value, str):
            if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
                raise error(f"{name} holds {shown(value)}, half of a character: text that is no Unicode.")
        elif isinstance(value, int):
            if not -_INTEGER <= value < _INTEGER:
                raise error(f"{name} holds {shown(value)}, an integer beyond 64 bits.")
        elif not isinstance(value, float | None):
            kind = type(value).__name__
            raise error(f"{name} holds {shown(value)}, which YAML reads as a {kind}. Put quotes around it.")


def is_plain_name(file: str) -> bool:
    """Whether ``file`` names something in a folder, and nothing outside of it on any system."""
    return 0 < len(file) < 256 and file not in (".", "..") and not any(c in '/\\:*?"<>|' or ord(c) < 32 for c in file)


class ToldAs:
    """Turns whatever a library raises in the block, on data that it cannot make sense of, into one error of ours.

    Libraries that read files raise anything on some of them, panics of compiled code included. Shardwright's own
    errors pass.

    Args:
        error: what is raised instead.
        what: the beginning of its message, which goes on with what the library said.
        hint: the end of its message.
    """

    def __init__(self, error: type[ShardwrightError], what: str, hint: str = "") -> None:
        self._error, self._what, self._hint = error, what, hint

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, raised: BaseException | None, _: object) -> None:
        if raised is None or isinstance(raised, ShardwrightError):
            return
        if isinstance(raised, Exception) or type(raised).__module__ == "pyo3_runtime":  # a panic in Rust
            raise self._error(f"{self._what}: {_reason(raised)}.{self._hint}") from raised


def _reason(error: BaseException) -> str:
    """What was said, as the end of a sentence; with the type of the error where the message says little."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    text = " ".join(text.split())
    text = text if len(text) <= 300 else f"{text[:300]} ..."
    return (text if " " in text else f"{type(error).__name__}: {text}").rstrip(".: ")
