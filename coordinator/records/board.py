"""A run's figures as TensorBoard events.

Events are written in the calling thread. tensorboardX's own `SummaryWriter` writes them in a thread of its own, where a
full disk ends in a traceback that its caller never hears of.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any, cast

# tensorboardX imports torch where there is one, which takes a second and serves nothing here. It can do without, and so
# can the coordinator: torch is hidden while it is imported, unless it is loaded already.
_HIDES_TORCH = "torch" not in sys.modules
if _HIDES_TORCH:
    cast(dict[str, Any], sys.modules)["torch"] = None
try:
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.summary import scalar
finally:
    if _HIDES_TORCH:
        del sys.modules["torch"]

_NUMBERS = count()

FLUSH_S = 10.0
"""Events reach the disk after this time at the latest, if others follow them."""


class Board:
    """One file of events in `folder`. Raises `OSError` where the disk does.

    `first_step` is the first step that will be written: TensorBoard drops what earlier files of the folder say of it
    and of later ones, so that steps which a resumed run does again are drawn once.
    """

    def __init__(self, folder: Path, first_step: int, time_s: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # The writer's own name for the file tells seconds apart, and would write over one of this second.
        self._writer = EventsWriter(str(folder / "events"), f".{os.getpid()}.{next(_NUMBERS)}")
        self._flushed_s = time_s
        if first_step > 1:
            start = SessionLog(status=SessionLog.START)
            self._writer.write_event(Event(wall_time=time_s, step=first_step, session_log=start))
        self._writer.flush()

    def add(self, values: Mapping[str, float], step: int, time_s: float) -> None:
        """Write the figures of one step; `time_s` is Unix time."""
        for key, value in values.items():
            self._writer.write_event(Event(wall_time=time_s, step=step, summary=scalar(key, value)))
        if time_s - self._flushed_s >= FLUSH_S:
            self._flushed_s = time_s
            self._writer.flush()

    def close(self) -> None:
        """Flush and close the file."""
        self._writer.close()
