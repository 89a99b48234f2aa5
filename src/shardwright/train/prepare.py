"""What is done once per machine before training: the config, the tokenizer and the examples' tokens, in a folder.

The *job folder* is all that a rank needs. Whatever is wrong with the data, the tokenizer or the model's config comes
out here, in one process, before there are ranks.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from shardwright.errors import ConfigError
from shardwright.train.config import JOB_CONFIG, TrainConfig
from shardwright.train.conversations import prepare_template, read_documents
from shardwright.train.dataset import Shape, write_packed, write_separate
from shardwright.train.documents import write_documents
from shardwright.train.encoding import encode
from shardwright.train.find import find_files
from shardwright.train.lora import check_adapters
from shardwright.train.model import check_fit, model_config
from shardwright.train.packing import check_keeps_apart
from shardwright.train.records import read_records
from shardwright.train.sample import sample
from shardwright.train.sections import DataSettings
from shardwright.train.text import read_texts
from shardwright.train.tokenizer import load_tokenizer, train_tokenizer

TOKENIZER = "tokenizer"
VALIDATION = "validation"  # a folder with the rows of data.validation_paths, as those of the job folder

Say = Callable[[str], None]


def prepare(config: TrainConfig, folder: Path, say: Say) -> None:
    """Fill the job folder.

    Args:
        folder: an empty folder.
        say: told, in a sentence each, what was done; with rich's markup.

    Raises:
        ConfigError: the data, tokenizer or model config cannot be used; the message has the numbers.
    """
    data = config.data
    files = find_files(data)
    tokenizer = _tokenizer(config, files)
    prepare_template(tokenizer, data)
    architecture = model_config(config.model, tokenizer)
    check_fit(architecture, tokenizer, data.sequence_length)
    if config.lora.r:
        check_adapters(config.lora, architecture)
    if data.pack and data.format != "text":
        check_keeps_apart(architecture)
    tokenizer.save_pretrained(folder / TOKENIZER)
    shape = _write_rows(files, data, tokenizer, folder, say)
    if data.validation_paths:
        (folder / VALIDATION).mkdir()
        said = _prefixed(say, "Validation: ")
        _write_rows(find_files(data, data.validation_paths), data, tokenizer, folder / VALIDATION, said)
    config = _with_steps(config, shape, say)
    (folder / JOB_CONFIG).write_text(config.to_yaml())


def _prefixed(say: Say, prefix: str) -> Say:
    return lambda text: say(prefix + text)


def _with_steps(config: TrainConfig, shape: Shape, say: Say) -> TrainConfig:
    """``config`` with the steps that its epochs make."""
    if config.epochs is None:
        return config
    rows = shape.sequences - config.data.validation
    steps = math.ceil(config.epochs * rows / config.batch_size)
    say(f"{config.epochs:g} epochs of {rows:,} sequences in batches of {config.batch_size} are {steps:,} steps")
    return replace(config, steps=steps, epochs=None)


def _write_rows(
    files: Sequence[Path], data: DataSettings, tokenizer: PreTrainedTokenizerBase, folder: Path, say: Say
) -> Shape:
    size = sum(_size(file) for file in files) / 1e6
    if data.format == "text":
        write = write_packed if data.pack else write_separate
        shape, total = write(encode(read_texts(files, data.text_key), tokenizer), folder, data.sequence_length)
        used = f"{total:,} tokens"
        left_out = ""
    else:
        documents = read_documents(read_records(files), data, tokenizer)
        first = next(documents, None)
        if first is None:
            raise ConfigError(f"There is no example in the files of data.paths ({len(files)}, first {files[0]}).")
        shape, counts = write_documents(itertools.chain([first], documents), folder, data)
        say(sample(first, tokenizer))
        used = f"{counts.documents:,} examples, {counts.tokens:,} tokens, {counts.trained:,} of them trained on,"
        total, left_out = counts.tokens, counts.told(data)
    _require_enough(data, shape.sequences, total, len(files), left_out)
    say(
        f"{len(files):,} files, {size:.1f} MB: {used} of a vocabulary of {len(tokenizer):,}, "
        f"{shape.sequences:,} sequences of {shape.sequence_length}{'. Of the examples, ' * bool(left_out)}{left_out}"
    )
    return shape


def _size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def _tokenizer(config: TrainConfig, files: Sequence[Path]) -> PreTrainedTokenizerBase:
    if config.tokenizer.vocab_size is not None:
        texts = (piece.text for piece in read_texts(files, config.data.text_key))
        return train_tokenizer(texts, config.tokenizer.vocab_size)
    folder = config.tokenizer.path or config.model.path
    assert folder is not None, "TrainConfig requires one of the three"
    return load_tokenizer(folder)


def _require_enough(data: DataSettings, sequences: int, tokens: int, files: int, left_out: str) -> None:
    needed = data.validation + 1
    if sequences < needed:
        held = f" and {data.validation} more to hold out (data.validation)" if data.validation else ""
        given = "1 file gives" if files == 1 else f"{files:,} files give"
        raise ConfigError(
            f"The text is too short: {given} {tokens:,} tokens, which make {sequences} sequences of "
            f"data.sequence_length = {data.sequence_length}; training needs at least 1{held}. Give more text, or "
            f"lower data.sequence_length or data.validation.{' Of the examples, ' * bool(left_out)}{left_out}"
        )


def digest(folder: Path) -> str:
    """A fingerprint of the rows in the job folder, to tell whether two machines prepared the same data."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*.bin")):
        with path.open("rb") as file:
            found.update(path.relative_to(folder).as_posix().encode())
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()
