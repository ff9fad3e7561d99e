from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One corpus cache for all runs of the session, and none of the user's."""
    return tmp_path_factory.mktemp("cache")
