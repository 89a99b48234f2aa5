"""Folders in the temporary directory: each has an owner, and those of dead owners go."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from shardwright.errors import RunError
from shardwright.scratch import remove_left_over, scratch_folder

_OWNER = """
import time
from shardwright.scratch import scratch_folder
with scratch_folder() as folder:
    print(folder, flush=True)
    time.sleep(100)
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def test_a_folder_goes_with_its_owner_and_those_of_the_dead_with_the_next(temporary: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", _OWNER], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        theirs = Path(owner.stdout.readline().strip())
        (theirs / "tokens.bin").write_bytes(b"x")
        with scratch_folder() as mine:
            (mine / "file").touch()
            assert theirs.is_dir()  # it is alive
        assert not mine.exists()
        owner.kill()
    assert theirs.is_dir()
    with scratch_folder():
        assert not theirs.exists()
    assert list(temporary.iterdir()) == []


def test_only_our_own_are_removed(temporary: Path) -> None:
    (temporary / "elsewhere").mkdir()
    (temporary / "elsewhere" / "notes").touch()
    (temporary / "shardwright-link").symlink_to(temporary / "elsewhere")
    (temporary / "shardwright-file").touch()
    (temporary / "shardwright-young").mkdir()  # its owner is about to lock it
    (temporary / "shardwright-old").mkdir()
    before = time.time() - 1000
    os.utime(temporary / "shardwright-old", (before, before))
    remove_left_over()
    left = sorted(path.name for path in temporary.iterdir())
    assert left == ["elsewhere", "shardwright-file", "shardwright-link", "shardwright-young"]
    assert (temporary / "elsewhere" / "notes").exists()


def test_where_no_folder_can_be_made(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(temporary / "gone"))
    with pytest.raises(RunError, match=r"No folder can be made in .*gone: No such file"), scratch_folder():
        pass
