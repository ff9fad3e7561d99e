"""The child process that streams a hub corpus with `datasets` and writes its documents to stdout as frames.

Started by `node.data.hub`, which says why it is a process, and reads the frames: documents, then one END or
one ERROR. The data sets are plain files (Parquet, gzipped JSON); no code of the hub is run. Every fault
becomes one line that names the mend.
"""

from __future__ import annotations

import http.client
import os
import signal
import ssl
import sys
import threading
import traceback
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import BinaryIO

from netem.errors import ConfigError
from node.data.files import import_or_explain, text_of
from node.data.hub import DOCUMENT, END, ERROR, HEADER

_PROBE_TIMEOUT_S = 5.0
_INSTEAD = 'set data.corpus to "novels" or to a local file'


def main(name: str, dataset_id: str, subset: str, text_field: str) -> None:
    """Write the corpus to stdout and end the process. `name` is what the user calls it."""
    # What libraries print must not fall between the frames.
    frames = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        for text in documents(name, dataset_id, subset, text_field):
            _write(frames, DOCUMENT, text)
        _write(frames, END, "")
        frames.flush()
    except ConfigError as error:
        _write(frames, ERROR, str(error))
        frames.flush()
    except BrokenPipeError:
        pass  # the parent wants no more, or is gone
    finally:
        if sys.exc_info()[0] is not None:
            traceback.print_exc()
        # At once, whatever happened: in an orderly exit Arrow's threads abort the process, or hang it.
        os._exit(0)


def documents(name: str, dataset_id: str, subset: str, text_field: str) -> Iterator[str]:
    """Texts of the training split, streamed. Raises `ConfigError`, in seconds if the hub is out of reach."""
    place = f"data.corpus = {name!r}"
    datasets = import_or_explain("datasets", place)
    hub_errors = import_or_explain("huggingface_hub.errors", place)
    offline = datasets.config.HF_HUB_OFFLINE
    if not offline:
        # Asked first because `datasets` itself would try for 23 s before it gives up.
        _probe(datasets.config.HF_ENDPOINT, place)
    # The HTTP library under the hub's client has changed twice; its root exception is a base of this one.
    failures = (OSError, ValueError, RuntimeError, *hub_errors.HfHubHTTPError.__bases__)
    try:
        rows = datasets.load_dataset(dataset_id, subset or None, split="train", streaming=True)
        for number, row in enumerate(rows, start=1):
            yield text_of(row, text_field, f"{place}, row {number}")
    except ConfigError:
        raise
    except failures as error:
        if offline:
            raise ConfigError(
                f"{place}: HF_HUB_OFFLINE switches the Hugging Face hub off; unset it, or {_INSTEAD}"
            ) from None
        first_line = str(error).partition("\n")[0] or type(error).__name__
        raise ConfigError(f"{place}: reading {dataset_id} failed: {first_line}; {_INSTEAD}") from None


def _probe(endpoint: str, place: str) -> None:
    """One short request (through the proxy, if one is set); any answer at all will do."""
    try:
        with urllib.request.urlopen(endpoint, timeout=_PROBE_TIMEOUT_S):
            return
    except urllib.error.HTTPError:
        return
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLError):
            return  # it answered; `datasets` has its own bundle to judge the certificate by
        raise ConfigError(
            f"{place}: {endpoint} is out of reach ({reason}); check the network or proxy, or {_INSTEAD}"
        ) from None


def _write(frames: BinaryIO, kind: bytes, text: str) -> None:
    payload = text.encode("utf-8", "replace")
    frames.write(HEADER.pack(kind, len(payload)))
    frames.write(payload)


def _end_with_parent() -> None:
    """The parent holds our stdin open and writes nothing: its end is the parent's end."""
    sys.stdin.buffer.read()
    os._exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
