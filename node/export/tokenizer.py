"""A run's tokenizer as the files that `transformers.AutoTokenizer` reads: the same ids for the same text.

That of a folder goes over as it is. Our own are byte-level BPEs in the form of the `tokenizers` library. GPT-2's have
their merges; plain bytes are one without any, whose 256 symbols have the bytes' own values as ids. One thing is as
usual there, not as in training: a text that spells `<|endoftext|>` becomes that one token.
"""

from __future__ import annotations

from typing import Any

from netem.errors import ConfigError
from node.config import Config
from node.data.embedded import load_merges
from node.data.folder_tokenizer import FolderTokenizer
from node.data.tokenizers import END_OF_TEXT, Tokenizer, make_tokenizer


def exported_tokenizer(config: Config, vocab_size: int) -> Tokenizer:
    """The tokenizer of a run whose model embeds `vocab_size` tokens. Raises `ConfigError` where its folder has another
    by now, or cannot be read."""
    tokenizer = make_tokenizer(config.data.tokenizer)
    if isinstance(tokenizer, FolderTokenizer) and tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"data.tokenizer = {config.data.tokenizer!r}: has {tokenizer.vocab_size} tokens, and the model embeds "
            f"{vocab_size}; put back the tokenizer with which it was trained"
        )
    return tokenizer


def tokenizer_files(tokenizer: Tokenizer, context: int) -> dict[str, Any]:
    """Contents of the tokenizer's files, by file name: JSON values, or plain text. Raises `ConfigError` where its
    sources cannot be read."""
    if isinstance(tokenizer, FolderTokenizer):
        return tokenizer.files()
    merges = [] if tokenizer.name == "bytes" else gpt2_merges(tokenizer.vocab_size)
    vocabulary = gpt2_vocabulary(merges) if merges else byte_vocabulary()
    end = len(vocabulary)
    special = {"content": END_OF_TEXT, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "tokenizer.json": {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": end, **special, "special": True}],
            "normalizer": None,
            # Without merges no word is looked at as a whole, and text need not be cut into words.
            "pre_tokenizer": byte_level | {"use_regex": bool(merges)},
            "post_processor": None,
            "decoder": byte_level | {"use_regex": True},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": "",
                "end_of_word_suffix": "",
                "fuse_unk": False,
                "byte_fallback": False,
                "vocab": vocabulary,
                "merges": merges,
            },
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": END_OF_TEXT,
            "eos_token": END_OF_TEXT,
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": context,
        },
    }


def gpt2_merges(vocab_size: int) -> list[str]:
    """The merges that make a vocabulary of this size out of 256 bytes, end-of-text included."""
    return load_merges().splitlines()[1 : vocab_size - 256]  # the first line is the version


def gpt2_vocabulary(merges: list[str]) -> dict[str, int]:
    """GPT-2's ids: the bytes' characters in its order, then the merges in theirs. End-of-text follows."""
    symbols = [*byte_characters().values(), *(merge.replace(" ", "") for merge in merges)]
    return {symbol: index for index, symbol in enumerate(symbols)}


def byte_vocabulary() -> dict[str, int]:
    """Each byte's character, with the byte as its id. End-of-text follows."""
    characters = byte_characters()
    return {characters[byte]: byte for byte in range(256)}


def byte_characters() -> dict[int, str]:
    """The visible character that byte-level BPE writes for each byte, in GPT-2's order: printable bytes stand for
    themselves, and the n-th other byte is character 256 + n."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
