"""The parts of a run, each made from its sections of the config.

Below this, nothing knows the whole tree: a codec, a payload or a model takes the sections that it depends on.
"""

from __future__ import annotations

from msgspec.structs import replace

from netem.config import user_path
from node.config import Config
from node.exchange.payload import PayloadFormat
from node.model.exchanged import ExchangedLlama
from node.model.hf import embedded_tokens, init_weights
from node.subspace.ranks import RankTable


def payload_format(config: Config, ranks: RankTable | None = None) -> PayloadFormat:
    """What chunks send, with ranks from `ranks`, or from a table of its own. Of a site's processes each sends for its
    part of a step's contexts."""
    train = replace(config.train, batch=config.train.batch // config.coordinator.shards)
    sections = config.model, config.compress, train
    return PayloadFormat(*sections, config.run.seed, ranks, documents=config.data.document_masking)


def drawn_model(config: Config, vocab_size: int, ranks: RankTable | None = None) -> ExchangedLlama:
    """The model with weights from the seed."""
    return ExchangedLlama(config.model, config.compress, config.run, vocab_size, ranks)


def first_model(config: Config, vocab_size: int, ranks: RankTable | None = None) -> ExchangedLlama:
    """The model at the start of a run: with the weights of `model.init` where it is given, or else drawn from the seed.

    `vocab_size` is that of the data; a folder may embed more tokens than its tokenizer has. Raises `ConfigError` for a
    folder that is not a whole Llama of the config's shape.
    """
    if not config.model.init:
        return drawn_model(config, vocab_size, ranks)
    folder = user_path(config.model.init, "model.init")
    model = drawn_model(config, embedded_tokens(folder, config.data.tokenizer, vocab_size), ranks)
    init_weights(model, folder)
    return model
