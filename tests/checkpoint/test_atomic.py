"""Folders that appear whole, at every point where a kill can come, and that take the place of nothing but our own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shardwright.checkpoint import atomic
from shardwright.checkpoint.atomic import FolderWriter, recover_all, remove, require_replaceable, write_text
from shardwright.checkpoint.manifest import MANIFEST, foreign_in, ours_in, write_manifest
from shardwright.checkpoint.run_info import NAME, SET_ASIDE, list_checkpoints
from shardwright.checkpoint.store import _OURS, remove_set_aside, set_aside
from shardwright.errors import CheckpointError
from shardwright.lock import Lock


class _KilledError(BaseException):
    pass


def _write(folder: Path, text: str, files: tuple[str, ...] = ("file", "part/inner"), overwrite: bool = True) -> None:
    with FolderWriter(folder, overwrite) as writer:
        for file in files:
            (writer.path / file).parent.mkdir(parents=True, exist_ok=True)
            (writer.path / file).write_text(text)
        write_manifest(writer.path, {})
        writer.finish()


def _tree(folder: Path) -> dict[str, str]:
    """The content of every file below ``folder``."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_text() for path in files}


FOREIGN = {"notes.txt": "mine", ".git/HEAD": "ref", "part/mine": "too"}


def _with_foreign_files(folder: Path) -> None:
    _write(folder, "old", ("file", "part/inner", "gone"))
    for path, text in FOREIGN.items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(text)
    (folder / "empty").mkdir()


def _content(folder: Path) -> dict[str, str]:
    return {path: text for path, text in _tree(folder).items() if path != MANIFEST}


def test_only_what_the_manifest_lists_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "one"
    _with_foreign_files(folder)
    with pytest.raises(CheckpointError, match="set overwrite"):
        _write(folder, "new", overwrite=False)
    _write(folder, "new")
    assert _content(folder) == {"file": "new", "part/inner": "new", **FOREIGN}
    assert (folder / "empty").is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


@pytest.mark.parametrize("new", ["notes.txt", ".git", "notes.txt/x", "part/mine", "part/mine/x", "empty"])
def test_a_new_file_never_takes_the_place_of_a_foreign_one(tmp_path: Path, new: str) -> None:
    folder = tmp_path / "one"
    _with_foreign_files(folder)
    before = _tree(folder)
    with pytest.raises(CheckpointError, match="was not written by Shardwright"):
        _write(folder, "new", ("file", new))
    assert _tree(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_a_folder_of_somebody_else_stays_as_it_is(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("theirs")
    with pytest.raises(CheckpointError, match="holds files that Shardwright did not write"):
        _write(base, "new", overwrite=False)
    with pytest.raises(CheckpointError, match=r"config\.json was not written by Shardwright"):
        _write(base, "new", ("config.json",))
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is no folder"):
        _write(tmp_path / "file", "new")
    _write(base, "new")  # beside it there is room
    assert _content(base) == {"config.json": "theirs", "file": "new", "part/inner": "new"}


def test_a_link_is_followed_and_stays(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "one")
    with pytest.raises(CheckpointError, match="a link to nothing"):
        require_replaceable(tmp_path / "link", overwrite=True)
    (tmp_path / "disk" / "one").mkdir()
    for text in ("old", "new"):
        _write(tmp_path / "link", text)
    assert (tmp_path / "link").is_symlink()
    assert _content(tmp_path / "disk" / "one") == {"file": "new", "part/inner": "new"}
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["one"]


def test_a_hostile_manifest_makes_nothing_else_ours(tmp_path: Path) -> None:
    folder, outside = tmp_path / "one", tmp_path / "outside"
    outside.mkdir()
    (outside / "inner").write_text("mine")
    _write(folder, "old")
    (folder / "part" / "inner").unlink()
    (folder / "part").rmdir()
    (folder / "part").symlink_to(outside)  # the manifest lists part/inner
    assert foreign_in(folder, ours_in(folder)) == ["part"]
    remove(folder)
    assert (outside / "inner").read_text() == "mine"
    assert os.listdir(folder) == ["part"]


CALLS = ("pathlib.Path.rename", "pathlib.Path.mkdir", "pathlib.Path.unlink", "shutil.rmtree", "os.fsync", "os.rmdir")


def _killed_after(calls: int, monkeypatch: pytest.MonkeyPatch, action: str, *args: object) -> bool:
    """Whether the call number ``calls`` that changes the disk was the last of ``action``, as by SIGKILL."""
    made = 0

    def counted(real):
        def call(*args, **kwargs):
            nonlocal made
            made += 1
            if made > calls:
                raise _KilledError
            return real(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for target in CALLS:
            module, _, name = target.rpartition(".")
            owner = Path if module == "pathlib.Path" else __import__(module)
            patch.setattr(owner, name, counted(getattr(owner, name)))
        # What follows a kill does not run, but the kernel closes the lock's file.
        patch.setattr(FolderWriter, "__exit__", lambda self, *_: _close(self._lock) if made > calls else _exit(self))
        patch.setattr(Lock, "release", lambda self: _close(self) if made > calls else _release(self))
        try:
            globals()[action](*args)
        except _KilledError:
            return True
    return False


_exit, _release = FolderWriter.__exit__, Lock.release


def _close(lock: Lock) -> None:
    file, lock._file = lock._file, None
    if file is not None:
        os.close(file)


@pytest.mark.parametrize("foreign", [False, True])
def test_a_kill_at_any_call_leaves_old_or_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, foreign: bool) -> None:
    old = {"file": "old", "part/inner": "old", "gone": "old"}
    new = {"file": "new", "part/inner": "new"}
    more = FOREIGN if foreign else {}
    for calls in range(100):
        root = tmp_path / str(calls)
        folder = root / "step-00000001"
        root.mkdir()
        if foreign:
            _with_foreign_files(folder)
        else:
            _write(folder, "old", tuple(old))
        killed = _killed_after(calls, monkeypatch, "_write", folder, "new")
        recover_all(root, NAME)
        assert [path.name for path in root.iterdir()] == ["step-00000001"]
        assert _content(folder) in ([{**old, **more}, {**new, **more}] if killed else [{**new, **more}]), calls
        if not killed:
            break
    assert calls > 8
    assert not killed


def test_a_kill_at_any_call_of_a_removal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for calls in range(100):
        folder = tmp_path / str(calls) / "step-00000001"
        folder.parent.mkdir()
        _with_foreign_files(folder)
        killed = _killed_after(calls, monkeypatch, "remove", folder)
        recover_all(folder.parent, NAME)
        if killed and (folder / MANIFEST).is_file():  # it had not begun
            continue
        assert list_checkpoints(folder.parent) == []
        assert _tree(folder.parent) == {f"step-00000001/{path}": text for path, text in FOREIGN.items()}
        if not killed:
            break
    assert not killed


def test_what_is_in_the_way_and_not_left_by_a_kill_stays(tmp_path: Path) -> None:
    for name in (".one.unfinished", ".one.old"):
        mine = tmp_path / name
        mine.mkdir()
        (mine / "notes").write_text("mine")
        with pytest.raises(CheckpointError, match="in the way"):
            _write(tmp_path / "one", "new")
        recover_all(tmp_path, atomic.re.compile("one"))
        assert _tree(tmp_path) == {f"{name}/notes": "mine"}
        (mine / "notes").unlink()
        mine.rmdir()


def test_checkpoints_of_another_branch_are_set_aside_and_removed_when_there_is_a_new_one(tmp_path: Path) -> None:
    for step in (3, 6, 9):
        _write(tmp_path / f"step-{step:08d}", str(step))
    assert [path.name for path in set_aside(tmp_path, after=3)] == [
        ".step-00000006.replaced",
        ".step-00000009.replaced",
    ]
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000003"]
    _write(tmp_path / "step-00000006", "6")
    (tmp_path / ".step-00000009.replaced" / "notes").write_text("mine")
    moved = set_aside(tmp_path, after=0)
    assert [path.name for path in moved] == [".step-00000003.replaced", ".step-00000006.replaced1"]
    assert all(SET_ASIDE.fullmatch(path.name) for path in moved)
    remove_set_aside(tmp_path)
    recover_all(tmp_path, _OURS)
    assert _tree(tmp_path) == {".step-00000009.replaced/notes": "mine"}


def test_a_lock_is_one_process_s_until_it_ends(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    code = (
        "import sys, pathlib, time; from shardwright.lock import Lock\n"
        "lock = Lock(pathlib.Path(sys.argv[1])); print(lock.take(), flush=True); time.sleep(100)"
    )
    with subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "True\n"
        mine = Lock(path)
        assert not mine.take()
        assert f"process {other.pid} on " in mine.holder()
        other.kill()
    assert mine.take()
    assert mine.left_over
    assert not Lock(path).take()
    mine.release()
    assert not path.exists()
    assert mine.take()
    assert not mine.left_over
    mine.release()


def test_two_writers_of_one_folder(tmp_path: Path) -> None:
    with FolderWriter(tmp_path / "one") as writer:
        with pytest.raises(CheckpointError, match="is being written by another process"):
            _write(tmp_path / "one", "other")
        (writer.path / "file").write_text("first")
        writer.finish()
    assert _tree(tmp_path) == {"one/file": "first"}


def test_a_text_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "a", "one")

    def full(_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            write_text(tmp_path / "a", "two")
    assert _tree(tmp_path) == {"a": "one"}
