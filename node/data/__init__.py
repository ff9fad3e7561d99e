"""The data room: from a corpus to the batch at (seed, cursor), the same on every node after every restart.

Reading order: `config` (what can be chosen), `sources` with `documents`, `files`, `folders`, `packed`, `hub`,
`hub_reader` (documents, one at a time), `ids`, `tokenizers`, `folder_tokenizer`, `split` (which text is held out),
`build` and `store` (tokenised once, mapped by all processes), `batches` (contexts out of tokens), `task` (the interface
that training uses), `recall` (a made-up task), `corpus` (all of it in one call). `embedded` holds the files that ship
with the package. This package imports no torch, no other room but `node.config`, and nothing of training.
"""

from node.config.data import DataConfig
from node.data.batches import BatchSampler, heldout_contexts, heldout_count
from node.data.corpus import Corpus, open_data
from node.data.task import Task
from node.data.tokenizers import Tokenizer, make_tokenizer

__all__ = [
    "BatchSampler",
    "Corpus",
    "DataConfig",
    "Task",
    "Tokenizer",
    "heldout_contexts",
    "heldout_count",
    "make_tokenizer",
    "open_data",
]
