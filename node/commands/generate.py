"""`isthmus generate`: text from a checkpoint, or from the folder of an export or another Llama."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from coordinator.records.folder import step_of
from netem.errors import ConfigError
from node.commands.evaluate import checkpoint_config, find_checkpoint
from node.config import Config, load_config
from node.config.data import RECALL
from node.config.pretrained import CONFIG_JSON, read_json

if TYPE_CHECKING:
    from node.data.tokenizers import Tokenizer
    from node.exchange.passes import PassSpec
    from node.model.exchanged import ExchangedLlama


class Wish(NamedTuple):
    """What is to be written: `tokens` of them after `prompt`, drawn at `temperature` from `seed`."""

    prompt: str
    tokens: int
    temperature: float
    seed: int


class _Positions(msgspec.Struct):
    max_position_embeddings: int = 2048


def generate(path: Path, wish: Wish, overrides: Sequence[str] = ()) -> str:
    """The prompt and what follows it, to the end of the text or of the wish.

    `path` is a checkpoint, a run's folder, or a Hugging Face folder of a Llama. Raises `ConfigError` where it is none,
    or where the model's predictions would depend on tokens that are not written yet (`Config.leaks`).
    """
    if wish.tokens < 1 or wish.temperature < 0 or wish.seed < 0:
        raise ConfigError("--tokens: expected 1 or more, and --temperature and --seed 0 or more")
    if (path / CONFIG_JSON).is_file():
        return _write(*_of_folder(path, overrides), wish)
    return _write(*_of_checkpoint(find_checkpoint(path), overrides), wish)


def _of_folder(folder: Path, overrides: Sequence[str]) -> tuple[Config, ExchangedLlama, PassSpec]:
    from node.data.tokenizers import make_tokenizer
    from node.train.from_config import first_model
    from node.train.schedule import StepSchedule

    where = str(folder.resolve())
    context = read_json(folder / CONFIG_JSON, _Positions).max_position_embeddings
    own = [f"--model.init={where}", f"--data.tokenizer={where}", "--compress.mode=dense", "--model.chunks=1"]
    config = load_config(None, [*own, f"--model.context={context}", *overrides])
    model = first_model(config, make_tokenizer(config.data.tokenizer).vocab_size)
    return config, model, StepSchedule(config.model, config.compress, config.train).pass_spec(config.train.steps)


def _of_checkpoint(checkpoint: Path, overrides: Sequence[str]) -> tuple[Config, ExchangedLlama, PassSpec]:
    config = checkpoint_config(checkpoint, overrides)
    if config.data.corpus == RECALL:
        raise ConfigError(f"{checkpoint}: was trained on the recall probe, which is no text")
    from node.train.checkpoint import load_model, vocab_size_of
    from node.train.from_config import drawn_model
    from node.train.schedule import StepSchedule

    spec = StepSchedule(config.model, config.compress, config.train).pass_spec(step_of(checkpoint))
    if config.leaks and spec.compressed:
        raise ConfigError(
            f'{checkpoint}: with compress.own = "projected" its predictions depend on tokens that are not written yet; '
            "give --compress.mode dense to see the model without that"
        )
    model = drawn_model(config, vocab_size_of(checkpoint))
    load_model(checkpoint, model)
    # A pass of the warm start is shorter than a context, and the context is what the model will be used at.
    return config, model, spec._replace(tokens=config.model.chunk_tokens)


def _write(config: Config, model: ExchangedLlama, spec: PassSpec, wish: Wish) -> str:
    from coordinator.assignment import assign
    from node.data.tokenizers import make_tokenizer
    from node.exchange.chunks import ChunkExchange
    from node.exchange.payload import PayloadFormat
    from node.export.generate import Sampling, continuation
    from node.worker.node import choose_device

    tokenizer = make_tokenizer(config.data.tokenizer)
    prompt = [int(token) for token in tokenizer.encode_document(wish.prompt)] or [tokenizer.eot]
    model = model.to(choose_device(config.run)).eval()
    # All of the text is one document, so nothing is masked, whatever the run did.
    payload = PayloadFormat(config.model, config.compress, config.train, config.run.seed, model.ranks)
    exchange = ChunkExchange(assign(config.model.chunks, 1), 0, payload)
    written = continuation(model, exchange, spec, prompt, Sampling(wish.temperature, wish.seed))
    return wish.prompt + tokenizer.decode(_text_of(islice(written, wish.tokens), tokenizer))


def _text_of(ids: Iterator[int], tokenizer: Tokenizer) -> list[int]:
    """Up to the end of the text. A model may embed more tokens than its tokenizer has: such an id ends it too."""
    return list(takewhile(lambda token: token != tokenizer.eot and token < tokenizer.vocab_size, ids))
