"""Folders that appear whole: at every point where a kill can come."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardwright.checkpoint.atomic import begin, finish, recover, remove, unfinished


class _KilledError(BaseException):
    pass


def _write(folder: Path, text: str) -> None:
    (begin(folder) / "file").write_text(text)
    finish(folder)


@pytest.mark.parametrize("kill_at", range(12))
def test_a_kill_at_any_call_leaves_old_or_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill_at: int) -> None:
    folder = tmp_path / "one"
    _write(folder, "old")
    calls = 0

    def counted(real):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls > kill_at:
                raise _KilledError
            return real(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for target in ("pathlib.Path.rename", "pathlib.Path.mkdir", "shutil.rmtree", "os.fsync"):
            module, _, name = target.rpartition(".")
            owner = Path if module == "pathlib.Path" else __import__(module)
            patch.setattr(owner, name, counted(getattr(owner, name)))
        try:
            _write(folder, "new")
        except _KilledError:
            killed = True
        else:
            killed = False
    recover(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["one"]
    assert (folder / "file").read_text() in (("old", "new") if killed else ("new",))


def test_removing_and_unfinished_names(tmp_path: Path) -> None:
    _write(tmp_path / "one", "x")
    begin(tmp_path / "two")
    assert unfinished(tmp_path / "two").is_dir()
    remove(tmp_path / "one")
    recover(tmp_path)
    assert list(tmp_path.iterdir()) == []
