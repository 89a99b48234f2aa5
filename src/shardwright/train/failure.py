"""Where a rank leaves why it failed, for torch's launcher. Standard library only."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress


def leave_failure(message: str, call_stack: str) -> None:
    """Put an error into the file that torch's launcher reads when this process has failed.

    The file is there whole or not at all, because the launcher ends with an error of its own on half a file. Where the
    disk has no room for the call stack, the message alone is left.

    Args:
        message: the type of the error, a colon, and what it says.
        call_stack: where it came from, in lines.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not file:
        return
    beside = f"{file}.unfinished"
    for stack in (call_stack, ""):
        extra = {"py_callstack": stack, "timestamp": str(int(time.time()))}
        with suppress(OSError):
            with open(beside, "w", encoding="utf-8") as opened:
                json.dump({"message": {"message": message, "extraInfo": extra}}, opened)
            os.replace(beside, file)
            return
