"""Finding and reading text, whole and in pieces."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import time
from itertools import chain, pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from shardwright.errors import ConfigError
from shardwright.train.encoding import encode
from shardwright.train.find import find_files
from shardwright.train.sections import DataSettings
from shardwright.train.text import PIECE, Piece, pieces, read_texts


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
        ({"paths": ("nowhere",)}, "'nowhere' in data.paths does not exist"),
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
    texts = list(read_texts(find_files(DataSettings(paths=(str(folder),))), "text"))
    assert texts == [Piece("a"), Piece("one"), Piece("two"), Piece("b")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "ok"}\n{"text": ', "line 2, is not valid JSON"),
        (b'{"txt": "x", "id": 1}', "line 1, has no text under the key 'text' (it has 'txt', 'id')"),
        (b'["x"]', "line 1, is a list and not a mapping with the text under the key 'text'"),
        (
            b'{"text": [{"role": "user"}]}',
            "line 1, has a list under the key 'text', and not a text (for a conversation, set data.format",
        ),
        (b'{"text": null}', "line 1, has null under the key 'text', and not a text. Set"),
        (b'{"text": "\xff"}', "is not UTF-8 text (byte 10)"),
        (b'{"text": "\xc3', "is not UTF-8 text (byte 10)"),
        (b'{"text": "' + b"x" * 100_000 + b'\xff"}', "is not UTF-8 text (byte 100010)"),
        (b'{"text": "' + b"x" * 2**24 + b'"}', "line 1, has more than 16,777,216 characters"),
        (b"[" * 100_000, "line 1, is nested deeper than 64 levels"),
        (b'{"text": 1' + b"0" * 5000 + b"}", "line 1, is not valid JSON"),
        (b'{"text": "\\ud800"}', "line 1, holds '\\ud800', half of a character"),
    ],
)
def test_a_bad_line_is_told_with_its_place(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(ConfigError) as error:
        list(read_texts([tmp_path / "x.jsonl"], "text"))
    assert message in str(error.value)


def test_globs_are_those_of_python_and_search_every_folder_once(tmp_path: Path) -> None:
    for path in ("a.txt", ".hidden/b.txt", "x/c.txt", "x/y/d.txt", "x/y/e.py", "x/.h.txt", "z/y/f.txt"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    (tmp_path / "link").symlink_to(tmp_path / "x")
    for pattern in ("*.txt", "*/*.txt", "**/*.txt", "x/**", "**/y/*", "*/y/d.txt", "**/.h.txt", ".*/*", "[xz]/*/?.*"):
        expected = {path for path in tmp_path.glob(pattern) if path.is_file()}
        # As the shell and Python's glob module do, and unlike pathlib: names with a dot only where the pattern has it.
        hidden = re.compile(r"(^|/)\.")
        if not hidden.search(pattern):
            expected = {path for path in expected if not hidden.search(path.relative_to(tmp_path).as_posix())}
        if pattern in ("x/**",):  # pathlib finds folders only
            expected = {tmp_path / "x/c.txt", tmp_path / "x/y/d.txt", tmp_path / "x/y/e.py"}
        found = find_files(DataSettings(paths=(f"{tmp_path}/{pattern}",)))
        assert set(found) == expected, pattern


def test_a_glob_of_many_stars_and_a_pipe_end_soon(tmp_path: Path) -> None:
    for number in range(3000):
        folder = tmp_path / f"{number % 10}" / f"{number // 10 % 10}" / f"{number // 100}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "a.txt").touch()
    begin = time.process_time()
    with pytest.raises(ConfigError, match="matches no file"):
        find_files(DataSettings(paths=(f"{tmp_path}/{'**/' * 12}*.nothing",)))
    assert time.process_time() - begin < 5
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="is no file"):
        find_files(DataSettings(paths=(str(tmp_path / "pipe"),)))


@given(st.text("a \n", max_size=400), st.integers(2, 40))
def test_pieces_are_the_text(text: str, size: int) -> None:
    made = list(_pieces_of(text, size))
    assert "".join(piece.text for piece in made) == (text if text.strip() or len(text) > size else "")
    assert all(len(piece.text) <= 2 * size for piece in made)
    assert [piece.last for piece in made] == [False] * (len(made) - 1) + [True] * bool(made)
    for before, piece in pairwise(made):
        assert (before.before + before.text).endswith(piece.before) or len(piece.before) == 64


def _pieces_of(text: str, size: int) -> list[Piece]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shardwright.train.text.PIECE", size)
        return list(pieces(io.StringIO(text, newline="").read))


_STDLIB = Path(os.__file__).parent
TEXT = (
    "\n".join(path.read_text() for path in sorted((_STDLIB / "json").glob("*.py"))) + "日本語  ünïcödé\t\t\r\n\n" * 99
)
_SPECIAL = ["<b>", "<e>"]
_AROUND = processors.TemplateProcessing(single="<b> $A <e>", special_tokens=[("<b>", 0), ("<e>", 1)])


def _byte_level(split: pre_tokenizers.PreTokenizer) -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = split, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=_SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<e>", bos_token="<b>")


def _gpt2() -> PreTrainedTokenizerFast:
    return _byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))


def _llama3() -> PreTrainedTokenizerFast:
    words = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    split = pre_tokenizers.Split(Regex(words), "isolated")
    made = _byte_level(pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)]))
    made.backend_tokenizer.post_processor = _AROUND
    return made


def _unigram() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.Unigram())
    made.normalizer, made.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=500, special_tokens=[*_SPECIAL, "<u>"], unk_token="<u>", show_progress=False
    )
    made.train_from_iterator(TEXT.split("\n"), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<e>", unk_token="<u>")


def _word_piece() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.WordPiece(unk_token="<u>"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=500, special_tokens=[*_SPECIAL, "<u>"], show_progress=False)
    made.train_from_iterator([TEXT], trainer)
    made.post_processor = _AROUND
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<e>", unk_token="<u>")


@pytest.mark.parametrize("make", [_gpt2, _llama3, _unigram, _word_piece])
def test_the_tokens_of_pieces_are_those_of_the_whole(make) -> None:
    tokenizer = make()
    (whole,) = encode([Piece(TEXT)], tokenizer)
    assert whole.ids[-1] == tokenizer.eos_token_id
    made = _pieces_of(TEXT, 700)
    assert len(made) > 50
    parts = list(encode(made, tokenizer))
    assert list(chain.from_iterable(part.ids.tolist() for part in parts)) == whole.ids.tolist()
    assert [part.last for part in parts] == [piece.last for piece in made]


_PREPARE = """
import resource
from dataclasses import replace
from pathlib import Path
from shardwright.train import text
from shardwright.train.config import load_config
from shardwright.train.prepare import prepare
text.PIECE = 2**14  # the time that a word takes grows with the square of its length
config = load_config("run.json")
for name in ("small", "lines", "words", "letters"):
    Path(name).mkdir()
    paths = ("small.txt", *(() if name == "small" else (f"{name}.txt",)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    prepare(replace(config, data=replace(config.data, paths=paths)), Path(name), print)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    assert name == "small" or grown < 60, f"{grown} MB more for {name}"
"""


def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    """Each of the three takes 110 MB and more in one piece."""
    texts = {"small": TEXT, "lines": "one two three\n" * 60_000, "words": "one two three " * 60_000}
    texts["letters"] = "onetwothree" * 60_000
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_text(text)
    (tmp_path / "run.json").write_text(
        '{"model": {"config": {"model_type": "gpt2", "n_layer": 1}}, "tokenizer": {"vocab_size": 300},'
        ' "data": {"paths": ["small.txt"], "sequence_length": 64}}'
    )
    done = subprocess.run([sys.executable, "-c", _PREPARE], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in ("lines", "words", "letters"):
        assert (tmp_path / name / "tokens.bin").stat().st_size > PIECE
