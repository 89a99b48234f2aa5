"""Ways to damage a file: bits and bytes of any, values of JSON, lengths and words of binary ones."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from typing import Any

Chance = random.Random
_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**40, -(2**40), 2**63, 10**30, 1.5, -0.0, 1e308, float("inf"), float("nan"),
    "", "x", "x" * 5000, "\0", "\ud800", "../../etc/passwd", "a/b", "os.system", [], {}, [[]], [None], {"": 0},
)  # fmt: skip
_TEXTS = (
    b"-1", b"1e999", b"NaN", b"99999999999999999999", b"9" * 5000, b"[" * 3000, b"{\"a\":" * 2000, b"\\ud800", b"\0",
    b"\xff\xfe", b"&a [*a]", b"*b", b"!!python/object/apply:os.system [true]",
    b"? ", b"<<: ", b"!!int x", b"2001-13-45",
)  # fmt: skip
_WORDS = (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)
# Operations of a pickle that call, look up, or put something far away; and what torch writes around a tensor.
_PICKLED = (
    b"cposix\nsystem\n(X\x04\x00\x00\x00truetR",
    b"\x8c\x05posix\x8c\x06system\x93", b"r\xff\xff\xff\x7f", b"R", b"b",
    b"\x81", b"\x92", b"Q", b"o", b"i", b"\x95" + b"\xff" * 8, b"\x8d" + b"\xff" * 8, b"0", b"2", b"torch\nSize\n",
    b"(", b"t", b".",
)  # fmt: skip


def mutate(data: bytes, chance: Chance, others: Sequence[bytes]) -> bytes:
    """``data`` damaged in one to three ways.

    Args:
        others: contents that may take its place, or a part of it.
    """
    ways: list[Callable[[bytes, Chance], bytes]] = [
        _flip, _flip, _cut, _delete, _insert, _repeat, _zero, _number, _number, _word, _word, _token, _pickled, _join,
    ]  # fmt: skip
    if chance.random() < 0.03:
        return chance.choice(others)
    if data[:1] in (b"{", b"[") and chance.random() < 0.6:
        return _json(data, chance)
    if data[8:9] == b"{" and chance.random() < 0.4:
        return _header(data, chance)
    for _ in range(chance.choice((1, 1, 2, 3))):
        data = chance.choice(ways)(data, chance)
    return data


def _at(data: bytes, chance: Chance) -> int:
    return chance.randrange(len(data) + 1)


def _flip(data: bytes, chance: Chance) -> bytes:
    if not data:
        return b"\0"
    changed, at = bytearray(data), chance.randrange(len(data))
    changed[at] ^= 1 << chance.randrange(8)
    return bytes(changed)


def _cut(data: bytes, chance: Chance) -> bytes:
    return data[: _at(data, chance)]


def _delete(data: bytes, chance: Chance) -> bytes:
    at = _at(data, chance)
    return data[:at] + data[at + chance.choice((1, 2, 8, 100)) :]


def _insert(data: bytes, chance: Chance) -> bytes:
    at = _at(data, chance)
    return data[:at] + chance.randbytes(chance.choice((1, 2, 8, 100))) + data[at:]


def _repeat(data: bytes, chance: Chance) -> bytes:
    at, length = _at(data, chance), chance.choice((1, 8, 64, 1000))
    return data[:at] + data[at : at + length] * chance.choice((2, 3, 50)) + data[at + length :]


def _zero(data: bytes, chance: Chance) -> bytes:
    at, length = _at(data, chance), chance.choice((1, 8, 64, 1000))
    return data[:at] + bytes(len(data[at : at + length])) + data[at + length :]


def _number(data: bytes, chance: Chance) -> bytes:
    """One of the numbers that are written out, replaced."""
    places = list(re.finditer(rb"-?\d+", data[:200_000]))
    if not places:
        return _flip(data, chance)
    place = chance.choice(places)
    value = chance.choice((b"-1", b"0", b"1", b"1099511627776", b"9223372036854775808", b"9" * 40, b"1.5", b"null"))
    return data[: place.start()] + value + data[place.end() :]


def _word(data: bytes, chance: Chance) -> bytes:
    """Four or eight bytes, as lengths and offsets are written."""
    size = chance.choice((4, 8))
    at = chance.choice((0, 8, _at(data, chance)))
    value = (chance.choice(_WORDS) % 2 ** (8 * size)).to_bytes(size, "little")
    return data[:at] + value + data[at + size :]


def _token(data: bytes, chance: Chance) -> bytes:
    at = _at(data, chance)
    return data[:at] + chance.choice(_TEXTS) + data[at + chance.choice((0, 1, 5)) :]


def _pickled(data: bytes, chance: Chance) -> bytes:
    at = _at(data, chance)
    return data[:at] + chance.choice(_PICKLED) + data[at + chance.choice((0, 1)) :]


def _join(data: bytes, chance: Chance) -> bytes:
    """Two of its parts in the other order."""
    first, second = sorted((_at(data, chance), _at(data, chance)))
    return data[second:] + data[first:second] + data[:first]


def _json(data: bytes, chance: Chance) -> bytes:
    """One of the values of a JSON text replaced, removed, nested or renamed."""
    lines = data.splitlines(keepends=True)
    number = chance.randrange(len(lines)) if len(lines) > 1 and lines[1][:1] == b"{" else None  # a JSONL file
    try:
        value = json.loads(data if number is None else lines[number])
    except ValueError:
        return _flip(data, chance)
    for _ in range(chance.choice((1, 1, 2))):
        value = _changed(value, chance)
    made = json.dumps(value).encode()
    if number is None:
        return made
    lines[number] = made + b"\n"
    return b"".join(lines)


def _changed(value: Any, chance: Chance) -> Any:
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = chance.choice(list(value))
        action = chance.random()
        if action < 0.08:
            return {other: one for other, one in value.items() if other != key}
        if action < 0.12:
            return {
                (chance.choice(("x", "", "../x", "\ud800")) if other == key else other): one
                for other, one in value.items()
            }
        return {**value, key: _changed(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.9:
        at = chance.randrange(len(value))
        action = chance.random()
        if action < 0.08:
            return value[:at] + value[at + 1 :]
        if action < 0.14:
            return value[:at] + [value[at]] * chance.choice((2, 100)) + value[at + 1 :]
        return [*value[:at], _changed(value[at], chance), *value[at + 1 :]]
    if chance.random() < 0.05:
        for _ in range(chance.choice((30, 90, 600))):
            value = [value]
        return value
    return chance.choice(_VALUES)


def _header(data: bytes, chance: Chance) -> bytes:
    """The header of a safetensors file, its length set right behind the damage."""
    length = int.from_bytes(data[:8], "little")
    header = _json(data[8 : 8 + length], chance)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]
