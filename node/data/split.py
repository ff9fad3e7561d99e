"""Which text is held out: a rule of the text alone, so that no node or restart can mix the parts.

A corpus of at least `SMALL_CORPUS` documents holds out whole documents, one in ten, by a hash of their text.
A smaller one holds out the last tenth of each document, since among few documents the share that a hash picks is far
from a tenth. `node.data.build` applies the rule. Raise `SPLIT_VERSION` with any change, so that an old store is not
taken for a new one.
"""

from __future__ import annotations

import hashlib

SPLIT_VERSION = 1
SMALL_CORPUS = 100
ONE_IN = 10


def is_heldout(text: str) -> bool:
    """Whether the document `text` is held out (paper: 10 %). Equal texts fall on the same side."""
    digest = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8, person=b"isthmus-heldout")
    return int.from_bytes(digest.digest(), "little") % ONE_IN == 0


def train_length(length: int) -> int:
    """How many of a document's first `length` tokens are for training where its last tenth is held out."""
    return length - length // ONE_IN
