from __future__ import annotations

import signal
from pathlib import Path

import pytest

# A shell starts a command in the background with SIGINT ignored, which all its children inherit; with a handler here,
# they get Ctrl-C as a user's terminal would send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One corpus cache for all runs of the session, and none of the user's."""
    return tmp_path_factory.mktemp("cache")
