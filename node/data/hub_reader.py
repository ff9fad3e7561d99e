"""The child process that streams a hub corpus with `datasets` and sends its documents through a pipe.

`node.data.hub` starts it, says why it is a process, and reads its messages: documents and null rows, then one END
or one ERROR. The data sets are plain files (Parquet, gzipped JSON); no code from the hub is run. Every fault
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
from multiprocessing.connection import Connection

from netem.errors import ConfigError
from node.data.documents import document_of, import_or_explain
from node.data.hub import DOCUMENT, END, ERROR, NULL

_PROBE_TIMEOUT_S = 5.0
_INSTEAD = 'set data.corpus to "novels" or to a local file'


def main(descriptor: str, name: str, dataset_id: str, subset: str, text_field: str) -> None:
    """Send the corpus into the pipe `descriptor` and end the process. `name` is the name that the user gave it."""
    messages = Connection(int(descriptor), readable=False)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print belongs among the parent's messages
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        for text in documents(name, dataset_id, subset, text_field):
            messages.send_bytes(NULL if text is None else DOCUMENT + text.encode("utf-8"))
        messages.send_bytes(END)
    except ConfigError as error:
        messages.send_bytes(ERROR + str(error).encode("utf-8", "replace"))
    except BrokenPipeError:
        pass  # the parent wants no more, or is gone
    finally:
        if sys.exc_info()[0] is not None:
            traceback.print_exc()
        # At once, because in an orderly exit Arrow's threads abort the process or hang it.
        os._exit(0)


def documents(name: str, dataset_id: str, subset: str, text_field: str) -> Iterator[str | None]:
    """Texts of the training split, streamed; None for each that is null.

    Raises `ConfigError`, in seconds if the hub is out of reach.
    """
    place = f"data.corpus = {name!r}"
    datasets = import_or_explain("datasets", place)
    hub_errors = import_or_explain("huggingface_hub.errors", place)
    offline = datasets.config.HF_HUB_OFFLINE
    if not offline:
        # Probed first, because `datasets` itself would try for 23 s before it gives up.
        _probe(datasets.config.HF_ENDPOINT, place)
    # The hub's client has changed its HTTP library twice; this names the library's root exception, whichever it is.
    failures = (OSError, ValueError, RuntimeError, *hub_errors.HfHubHTTPError.__bases__)
    try:
        rows = datasets.load_dataset(dataset_id, subset or None, split="train", streaming=True)
        for number, row in enumerate(rows, start=1):
            document = document_of(row, text_field, f"{place}, row {number}")
            yield None if document is None else document.text
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
    """Make one short request, through the proxy if one is set. Any answer shows that the hub is in reach."""
    try:
        with urllib.request.urlopen(endpoint, timeout=_PROBE_TIMEOUT_S):
            return
    except urllib.error.HTTPError:
        return
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLError):
            return  # the hub answered; `datasets` checks the certificate with its own bundle
        raise ConfigError(
            f"{place}: {endpoint} is out of reach ({reason}); check the network or proxy, or {_INSTEAD}"
        ) from None


def _end_with_parent() -> None:
    """End this process when its stdin ends: the parent holds it open for as long as it lives, and writes nothing."""
    sys.stdin.buffer.read()
    os._exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
