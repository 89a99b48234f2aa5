"""What a rank leaves for torch's launcher, also where the disk is full."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

_CODE = """
import resource, sys
from shardwright.train.failure import leave_failure
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
leave_failure("RunError: no room", "a frame\\n" * 100)
"""


@pytest.mark.parametrize(("room", "stack"), [(10_000, "a frame\n" * 100), (400, ""), (20, None)])
def test_it_is_whole_or_not_there(tmp_path: Path, room: int, stack: str | None) -> None:
    file = tmp_path / "error.json"
    environment = {"TORCHELASTIC_ERROR_FILE": str(file), "PYTHONPATH": ":".join(filter(None, sys.path))}
    command = [sys.executable, "-B", "-c", _CODE, str(room)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if stack is None:
        assert not file.exists()
    else:
        report = json.loads(file.read_text())["message"]
        assert report["message"] == "RunError: no room"
        assert report["extraInfo"]["py_callstack"] == stack
