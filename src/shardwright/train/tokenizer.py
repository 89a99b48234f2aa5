"""The tokenizer of a run: loaded, or trained on the text on the spot."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from shardwright.errors import ConfigError

END_OF_TEXT = "<|endoftext|>"


def load_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    """The tokenizer saved in ``folder``; nothing is looked up on a network.

    Raises:
        ConfigError: no such folder, or no tokenizer in it.
    """
    if not Path(folder).is_dir():
        raise ConfigError(f"There is no folder {folder} to load a tokenizer from.")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"The folder {folder} holds no tokenizer that transformers can load ({_first_line(error)}). Set "
            "tokenizer.path to one that does, or tokenizer.vocab_size to train one."
        ) from None


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


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
