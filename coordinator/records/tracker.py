"""A run's figures in an experiment tracker, beside TensorBoard: Weights & Biases, or trackio, which has the same calls.

A tracker is another program's service. Where it cannot be started, the run says so and does not begin; where it fails
later, that is logged once and the run goes on.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from netem.errors import ConfigError

log = logging.getLogger("isthmus.tracker")

PROJECT = "isthmus"


class Tracker:
    """Sends the run's figures to the module called `kind`, wandb or trackio; to none where that is empty.

    `config` is what the tracker shows beside the run, without secrets. Raises `ConfigError` where the module is not
    installed, or does not take the run.
    """

    def __init__(self, kind: str, run_name: str, config: Mapping[str, Any]) -> None:
        self._kind = kind
        self._module: Any = None
        if not kind:
            return
        try:
            self._module = importlib.import_module(kind)
        except ImportError:
            raise ConfigError(f'run.tracker = "{kind}": is not installed; pip install {kind}') from None
        try:
            self._module.init(project=PROJECT, name=run_name, config=dict(config))
        except Exception as error:  # noqa: BLE001 (whatever another program raises)
            raise ConfigError(f'run.tracker = "{kind}": does not take the run ({_first_line(error)})') from None

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._module is not None:
            self._try("finish")

    def add(self, line: Mapping[str, Any]) -> None:
        """Send the run's own figures of one record: those of single nodes stay in metrics.jsonl."""
        if self._module is not None:
            figures = {key: value for key, value in line.items() if isinstance(value, float)}
            self._try("log", figures, step=int(line["step"]))

    def _try(self, call: str, *arguments: Any, **more: Any) -> None:
        try:
            getattr(self._module, call)(*arguments, **more)
        except Exception as error:  # noqa: BLE001 (whatever another program raises)
            log.warning("%s: gets no more figures of this run (%s)", self._kind, _first_line(error))
            self._module = None


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
