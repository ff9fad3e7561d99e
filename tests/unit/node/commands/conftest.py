from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ISTHMUS_TOKEN", raising=False)
    handler = signal.getsignal(signal.SIGTERM)  # `isthmus node` sets its own
    yield
    signal.signal(signal.SIGTERM, handler)
