"""`isthmus data prepare`: the tokens of a run's corpus, made before the run, so that a node joins at once."""

from __future__ import annotations

from node.config import Config
from node.data import open_data
from node.data.task import check_room


def prepare(config: Config) -> str:
    """Tokenise the corpus into the cache where it is not there yet; says what it holds. Raises `ConfigError` where
    there is no such corpus, or it has no context for this config."""
    task = open_data(config.data)
    check_room(task, config.model.context, config.train.batch)
    return task.summary
