"""Pickles as plain records: what they say, without making any of the objects that they ask for.

torch.distributed.checkpoint writes its metadata as a pickle, and so does ``torch.save`` what is around the bytes of a
tensor. A pickle is a program for making objects. Here it makes :class:`Record` s only, whatever it asks for, and its
operations are those that the two need.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from typing import Any

from shardwright.errors import CheckpointError
from shardwright.untrusted import ToldAs

# Those that torch 2.11 to 2.14 write. Left out on purpose: all that take an index of their own choice beyond the size
# of the pickle (which Python makes room for), and those that look an object up in the process.
_OPERATIONS = frozenset({
    "PROTO", "FRAME", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1",
    "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "TUPLE", "TUPLE1",
    "TUPLE2", "TUPLE3", "APPEND", "APPENDS", "SETITEM", "SETITEMS", "GLOBAL", "STACK_GLOBAL", "NEWOBJ",
    "REDUCE", "BUILD", "MEMOIZE", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "BINPERSID",
})  # fmt: skip


class Record:
    """What stands for an object.

    Attributes:
        name: of what the pickle would have called to make it, such as ``"torch.Size"``.
        arguments: that it would have been called with.
        state: that it would have been given then; None where there is none.
    """

    name: str
    arguments: tuple[Any, ...]
    state: Any

    def __new__(cls, *arguments: Any) -> Record:
        made = object.__new__(cls)
        made.arguments, made.state = arguments, None
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self._classes: dict[str, type[Record]] = {}

    def find_class(self, module: str, name: str) -> type[Record]:
        full = f"{module}.{name}"
        if full not in self._classes:
            self._classes[full] = type("Record", (Record,), {"name": full})
        return self._classes[full]

    def persistent_load(self, pid: Any) -> Any:
        return pid


def read_records(data: bytes, name: str) -> Any:
    """What the pickle ``data`` says: text, numbers, lists, mappings and records; a class by itself is a class of them.

    Args:
        name: of the file, for errors.

    Raises:
        CheckpointError: no pickle, or one with operations that torch does not write.
    """
    with ToldAs(CheckpointError, f"{name} is damaged"):
        for operation, argument, _ in pickletools.genops(data):
            if operation.name not in _OPERATIONS:
                raise CheckpointError(f"{name} has the operation {operation.name}, which torch does not write there.")
            if operation.name in ("BINPUT", "LONG_BINPUT") and int(argument or 0) > len(data):
                raise CheckpointError(f"{name} is damaged: it puts an object at place {argument:,}.")
        return _Unpickler(data).load()
