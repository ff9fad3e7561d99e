"""The `[data]` section: which corpus, which tokenizer, how much of it, and where the token store is kept.

Only names and bounds are checked here, without touching the disk or the network, so that a coordinator may
check a config whose files lie on the nodes. `node.data.sources` opens what the names stand for.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Annotated

from msgspec import Meta

from netem.config import Section, user_path
from netem.errors import ConfigError

EMBEDDED_CORPUS = "novels"
RECALL = "recall"
RECALL_PARTS = 16
"""Number of equal parts of a context of the recall probe. Every answer lies more than one part back."""
COPIES = "copies"
COPIES_BACK = 4
"""A copied passage repeats what stands at least a quarter of the context before it."""
HUB_CORPORA = ("fineweb", "c4", "bookcorpus")
KNOWN_CORPORA = (EMBEDDED_CORPUS, COPIES, RECALL, *HUB_CORPORA)
TOKENIZERS = ("gpt2", "gpt2-2048", "bytes")
"""The tokenizers that come with Isthmus. gpt2-2048 has only GPT-2's first merges, for models so small that an output
head of 50,257 rows would outweigh them."""


class DataConfig(Section, frozen=True, kw_only=True):
    """Corpus, tokenizer and token store of a run."""

    corpus: Annotated[
        str,
        Meta(
            min_length=1,
            description="novels (comes with Isthmus, offline); copies (the novels, with passages that repeat what "
            "lies far back in the context); recall (generated text whose answers lie far back in the context); "
            "fineweb, c4 or bookcorpus (streamed from the Hugging Face hub); or the path of a .txt, "
            ".jsonl or .parquet file (.txt and .jsonl also with .gz, .xz, .zst or .bz2), or of a folder of such files.",
        ),
    ] = EMBEDDED_CORPUS
    tokenizer: Annotated[
        str,
        Meta(
            min_length=1,
            description="gpt2: 50257 tokens; gpt2-2048: the first 2048 of them; bytes: 257 tokens; or the path of a "
            "Hugging Face folder with a tokenizer.json.",
        ),
    ] = "gpt2"
    text_field: Annotated[
        str,
        Meta(
            min_length=1,
            description="Field of a JSONL, Parquet or hub row that holds the document's text.",
        ),
    ] = "text"
    separator: Annotated[
        str,
        Meta(
            description="Text that ends a document within a .txt file, such as <|endoftext|>. "
            "Empty: each file is one document.",
        ),
    ] = ""
    max_tokens: Annotated[
        int,
        Meta(
            ge=0,
            description="Number of tokens after which reading stops. 0: read everything, or the first 100 million "
            "tokens of a hub corpus.",
        ),
    ] = 0
    document_masking: Annotated[
        bool,
        Meta(
            description="Keep attention within a document (intra-document masking): a token attends to no token before "
            "the last end-of-text, the first token of a document counts in no loss, and the theta of a chunk is made "
            "of its last document. false: a context is one sequence."
        ),
    ] = False
    document_tokens: Annotated[
        float,
        Meta(
            ge=0,
            description="Mean number of tokens in a document, from which isthmus plan and an automatic assignment "
            "expect what data.document_masking saves. 0: they expect no document to end within a context.",
        ),
    ] = 0.0
    cache: Annotated[
        str, Meta(description="Folder for the corpus in tokens. Empty: $ISTHMUS_CACHE, or else ~/.cache/isthmus.")
    ] = ""

    def check(self, path: str) -> None:
        """Raise `ConfigError` for a corpus or tokenizer that is neither a known name nor written as a path."""
        _check_name(f"{path}corpus", self.corpus, KNOWN_CORPORA, "a file or folder")
        _check_name(f"{path}tokenizer", self.tokenizer, TOKENIZERS, "a folder")
        if self.document_masking and self.corpus == RECALL:
            raise ConfigError(
                f"{path}document_masking = true: expected false, since the contexts of {path}corpus = {RECALL!r} are "
                f"not made of documents"
            )
        if self.document_tokens and not self.document_masking:
            raise ConfigError(
                f"{path}document_tokens = {self.document_tokens:g}: expected 0, since without "
                f"{path}document_masking = true nothing depends on it"
            )


def is_folder(tokenizer: str) -> bool:
    """Whether `data.tokenizer` is the path of a folder, and no name."""
    return tokenizer not in TOKENIZERS and _is_path(tokenizer)


def _is_path(text: str) -> bool:
    return any(mark in text for mark in "./\\~")


def _check_name(key: str, value: str, known: tuple[str, ...], what: str) -> None:
    if value in known or _is_path(value):
        return
    near = difflib.get_close_matches(value, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"write ./{value} if you mean {what}"
    raise ConfigError(f"{key} = {value!r}: expected {', '.join(known)} or a path; {hint}")


def cache_folder(config: DataConfig) -> Path:
    """Where token stores are kept: the setting, else $ISTHMUS_CACHE, else ~/.cache/isthmus."""
    chosen = config.cache or os.environ.get("ISTHMUS_CACHE") or "~/.cache/isthmus"
    return user_path(chosen, "data.cache")
