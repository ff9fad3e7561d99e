"""The data room: from a corpus to the batch at (seed, cursor), the same on every node after every restart.

Reading order: `config` (what can be chosen), `sources` with `files`, `hub`, `hub_reader` (documents, one at a
time), `tokenizers`, `split` (what is held out), `build` and `store` (tokenised once, mapped by all),
`batches` (contexts out of tokens), `task` (what training asks of a source of contexts), `recall` (one that is made up),
`corpus` (all of it in one call). `embedded` holds what ships with us.
It knows no torch, no network of ours and no training.
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
