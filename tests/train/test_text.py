"""Finding and reading text."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardwright.errors import ConfigError
from shardwright.train.config import DataSettings
from shardwright.train.text import find_files, read_texts


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "deep" / "b.txt").write_text("b")
    (tmp_path / "deep" / "c.py").write_text("c")
    (tmp_path / "empty.txt").write_text("  \n")
    return tmp_path


def names(settings: DataSettings) -> list[str]:
    return [file.name for file in find_files(settings)]


def test_files_folders_and_globs_each_file_once(folder: Path) -> None:
    assert names(DataSettings(paths=(str(folder),))) == ["a.txt", "b.txt", "empty.txt"]
    assert names(DataSettings(paths=(str(folder / "deep/c.py"), str(folder / "deep/c.py")))) == ["c.py"]
    assert names(DataSettings(paths=(f"{folder}/**/*.py", f"{folder}/*.txt"))) == ["a.txt", "c.py", "empty.txt"]
    assert names(DataSettings(paths=(str(folder),), exclude=("*/deep/*",))) == ["a.txt", "empty.txt"]
    assert "decoder.py" in names(DataSettings(paths=("stdlib:json",), include=("*.py",)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"paths": ("nowhere",)}, "nowhere in data.paths does not exist"),
        ({"paths": ("*.nothing",)}, "matches no file"),
        ({"paths": (".",), "include": ("*.rst",)}, "It has 4 files: 3 .txt, 1 .py. Set data.include"),
        ({"paths": (".",), "exclude": ("*",)}, "leaves none of the 3 files"),
    ],
)
def test_what_cannot_be_found_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, tuple[str, ...]], message: str
) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(ConfigError) as error:
        find_files(DataSettings(**settings))  # type: ignore[arg-type]
    assert message in str(error.value)


def test_texts_of_files_and_lines(folder: Path) -> None:
    (folder / "d.jsonl").write_text('{"text": "one", "id": 1}\n\n{"text": "two"}\n{"text": " "}\n')
    assert list(read_texts(find_files(DataSettings(paths=(str(folder),))), "text")) == ["a", "one", "two", "b"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "ok"}\n{"text": ', "line 2, is not valid JSON"),
        (b'{"txt": "x", "id": 1}', "line 1, has no text under the key 'text' (it has 'txt', 'id')"),
        (b'["x"]', "line 1, has no text under the key 'text'"),
        (b'{"text": "\xff"}', "is not UTF-8 text"),
    ],
)
def test_a_bad_line_is_told_with_its_place(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(ConfigError) as error:
        list(read_texts([tmp_path / "x.jsonl"], "text"))
    assert message in str(error.value)
