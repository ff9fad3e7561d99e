"""The hub's corpora, streamed by a child process: whole, abandoned, broken, silent, and never left behind."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from email.message import Message
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from netem.errors import ConfigError
from node.config.data import HUB_CORPORA
from node.data import hub, hub_reader
from node.data.hub import DATASETS, Dataset, HubStream

LIMIT_S = 60


def write_parquet(path: Path, rows: int, **columns: list[object]) -> None:
    texts = [f"document {number} " * 20 for number in range(rows)]
    pq.write_table(pa.table(columns or {"id": list(range(rows)), "text": texts}), path, row_group_size=100)


def test_every_hub_corpus_has_a_dataset() -> None:
    assert set(DATASETS) == set(HUB_CORPORA)


@pytest.mark.parametrize("answer", [urllib.error.HTTPError("", 404, "", Message(), None), ssl.SSLError("own bundle")])
def test_a_hub_that_answers_at_all_is_in_reach(monkeypatch: pytest.MonkeyPatch, answer: Exception) -> None:
    def urlopen(endpoint: str, timeout: float) -> None:
        raise answer if isinstance(answer, urllib.error.HTTPError) else urllib.error.URLError(answer)

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    hub_reader._probe("https://hub", "data.corpus = 'c4'")
    answer = TimeoutError("too late")
    with pytest.raises(ConfigError, match=r"'c4': https://hub is out of reach \(too late\)"):
        hub_reader._probe("https://hub", "data.corpus = 'c4'")


@pytest.mark.parametrize("name", HUB_CORPORA)
def test_the_identity_of_a_hub_corpus_tells_dataset_subset_and_field(name: str) -> None:
    identity = HubStream(name, "body").identity()
    assert identity == {"hub": list(DATASETS[name]), "split": "train", "text_field": "body"}


@pytest.fixture
def local_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in place of a dataset of the hub: all of the path to the child process and back is real."""
    folder = tmp_path / "dataset"
    folder.mkdir()
    monkeypatch.setitem(DATASETS, "fineweb", Dataset(str(folder), ""))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return folder


def test_a_hub_corpus_is_streamed_whole_and_in_order(local_hub: Path) -> None:
    write_parquet(local_hub / "train.parquet", 2, text=["one é", "x" * 600_000])
    documents = list(HubStream("fineweb", "text").documents())
    assert documents == [
        ("one é", "data.corpus = 'fineweb', row 1"),
        ("x" * 600_000, "data.corpus = 'fineweb', row 2"),
    ]


def test_null_rows_of_a_hub_corpus_are_skipped_and_counted(local_hub: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_parquet(local_hub / "train.parquet", 3, text=["one", None, "three"])
    documents = list(HubStream("fineweb", "text").documents())
    assert documents == [
        ("one", "data.corpus = 'fineweb', row 1"),
        ("three", "data.corpus = 'fineweb', row 3"),
    ]
    assert "data.corpus = 'fineweb': rows skipped because their text is null: 1" in caplog.text


def test_a_hub_corpus_may_be_abandoned(local_hub: Path) -> None:
    write_parquet(local_hub / "train.parquet", 20_000)
    with contextlib.closing(HubStream("fineweb", "text").documents()) as documents:
        first = list(itertools.islice(documents, 3))
    assert [document.text.split()[1] for document in first] == ["0", "1", "2"]


def test_a_hub_corpus_without_the_field_names_its_columns(local_hub: Path) -> None:
    write_parquet(local_hub / "train.parquet", 1, body=["a"])
    with pytest.raises(ConfigError, match=r"'fineweb', row 1: no field 'text'; .* body"):
        list(HubStream("fineweb", "text").documents())


def test_a_loading_script_is_refused_and_not_run(local_hub: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    script = local_hub / f"{local_hub.name}.py"
    script.write_text(f"open({str(ran)!r}, 'w')\n")
    with pytest.raises(ConfigError, match=r"data\.corpus = 'fineweb'"):
        list(HubStream("fineweb", "text").documents())
    assert not ran.exists()


def test_a_reader_that_dies_is_reported(local_hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ConfigError, match="'fineweb': the process that reads the hub ended early"):
        list(HubStream("fineweb", "text").documents())


def test_a_silent_hub_is_given_up(local_hub: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    silent = tmp_path / "silent"
    silent.write_text("#!/bin/sh\nexec cat\n")  # ends when its stdin does, and says nothing
    silent.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(silent))
    monkeypatch.setattr(hub, "SILENCE_TIMEOUT_S", 0.05)
    with pytest.raises(ConfigError, match=r"nothing came from the hub for 0\.05 s"):
        list(HubStream("fineweb", "text").documents())


def run_python(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )


OPEN_HUB_CORPUS = """
import sys
from netem.errors import ConfigError
from node.data import DataConfig, open_data
try:
    open_data(DataConfig(corpus="fineweb", cache=sys.argv[1]))
except ConfigError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("environment", "complaint"),
    [
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE switches the Hugging Face hub off; unset it"),
        ({"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:1", "no_proxy": "*"}, "http://127.0.0.1:1 is out of"),
    ],
)
def test_an_unreachable_hub_is_one_line_in_seconds(tmp_path: Path, environment: dict[str, str], complaint: str) -> None:
    started_s = time.monotonic()
    result = run_python(OPEN_HUB_CORPUS, str(tmp_path), **environment)
    elapsed_s = time.monotonic() - started_s
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert result.stdout.count("\n") == 1
    assert complaint in result.stdout
    assert 'set data.corpus to "novels" or to a local file' in result.stdout
    assert elapsed_s < 15  # `datasets` alone takes 23 s; typically 1


READ_THREE = """
import sys
from node.config.data import DataConfig
from node.data.files import LocalFiles
from node.data.hub import DATASETS, Dataset, HubStream
kind, path = sys.argv[1:]
DATASETS["fineweb"] = Dataset(path, "")
source = HubStream("fineweb", "text") if kind == "hub" else LocalFiles(DataConfig(corpus=path))
documents = source.documents()
print(*(next(documents).text.split()[1] for _ in range(3)))
sys.exit(0)  # with the generator open: whoever forgets to close it must not be punished by an abort
"""


@pytest.mark.parametrize("kind", ["hub", "files"])
def test_a_process_that_stops_reading_early_exits_cleanly(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "dataset"
    folder.mkdir()
    write_parquet(folder / "train.parquet", 20_000)
    for _ in range(3):  # the abort was seen in half of the exits
        result = run_python(READ_THREE, kind, str(folder), HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hf"))
        assert (result.returncode, result.stdout, result.stderr) == (0, "0 1 2\n", "")


READ_ONE_AND_DIE = """
import os, signal, sys
from node.data.hub import DATASETS, Dataset, HubStream
DATASETS["fineweb"] = Dataset(sys.argv[1], "")
documents = HubStream("fineweb", "text").documents()
next(documents)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_child_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    folder = tmp_path / "dataset"
    folder.mkdir()
    write_parquet(folder / "train.parquet", 20_000)
    # The child shares the parent's stderr, so this returns only once both have ended.
    result = run_python(READ_ONE_AND_DIE, str(folder), HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hf"))
    assert result.returncode == -signal.SIGKILL
    assert result.stderr == ""


def test_a_fault_of_our_own_in_the_child_keeps_its_traceback() -> None:
    script = (
        "from node.data import hub_reader\n"
        "hub_reader._end_with_parent = lambda: None\n"
        "hub_reader.main('1', 'fineweb', None, '', 'text')"
    )
    result = run_python(script, HF_HUB_OFFLINE="1")
    assert "Traceback" in result.stderr
