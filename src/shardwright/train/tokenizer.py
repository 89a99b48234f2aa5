"""The tokenizer of a run: loaded, or trained on the text on the spot."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from shardwright.checkpoint.description import read_tokenizer
from shardwright.errors import ConfigError
from shardwright.untrusted import usable_path

END_OF_TEXT = "<|endoftext|>"


def load_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    """The tokenizer saved in ``folder``; nothing is looked up on a network.

    Raises:
        ConfigError: no such folder, or no tokenizer in it.
    """
    path = usable_path(folder, "tokenizer.path", ConfigError)
    if not path.is_dir():
        raise ConfigError(f"There is no folder {folder} to load a tokenizer from.")
    try:
        return read_tokenizer(path)
    except ConfigError as error:
        raise ConfigError(
            f"{error} Set tokenizer.path to a folder with a tokenizer, or tokenizer.vocab_size to train one."
        ) from error


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE (Sennrich et al. 2016; bytes as in GPT-2) of ``vocab_size`` tokens, which can spell any text.

    Raises:
        ConfigError: the text is too small to yield that many tokens.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer=trainer)
    if bpe.get_vocab_size() != vocab_size:
        raise ConfigError(
            f"The text yields a tokenizer of {bpe.get_vocab_size()} tokens, fewer than tokenizer.vocab_size = "
            f"{vocab_size}. Lower it, or give more text."
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )
