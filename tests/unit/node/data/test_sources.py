"""Sources: every kind of file, every kind of damage, and processes that end cleanly when reading stops early."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import itertools
import json
import lzma
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from netem.errors import ConfigError
from node.config.data import HUB_CORPORA, DataConfig
from node.data import hub, hub_reader
from node.data.files import EmbeddedNovels, LocalFiles
from node.data.hub import DATASETS, Dataset, HubStream
from node.data.sources import make_source

LIMIT_S = 60


def read(path: Path, text_field: str = "text") -> list[str]:
    return [document.text for document in local(path, text_field).documents()]


def local(path: Path, text_field: str = "text", separator: str = "") -> LocalFiles:
    return LocalFiles(DataConfig(corpus=str(path), text_field=text_field, separator=separator))


def write_parquet(path: Path, rows: int = 1000, **columns: list[object]) -> Path:
    texts = [f"document {number} " * 20 for number in range(rows)]
    pq.write_table(pa.table(columns or {"id": list(range(rows)), "text": texts}), path, row_group_size=100)
    return path


def test_the_novels_are_seven_whole_documents() -> None:
    texts = [document.text for document in EmbeddedNovels().documents()]
    assert [text[:12] for text in texts][::6] == ["EMMA\n\nBy Jan", "MOBY DICK; O"]
    assert len(texts) == 7


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes("\ufeffOne\r\n\r\ntwo é".encode())
    assert read(path) == ["One\n\ntwo é"]


PACKERS: list[tuple[str, Callable[[bytes], bytes]]] = [
    ("jsonl", bytes),
    ("ndjson", bytes),
    ("JSONL", bytes),
    ("jsonl.gz", gzip.compress),
    ("json.gz", gzip.compress),
    ("Jsonl.GZ", gzip.compress),
    ("jsonl.xz", lzma.compress),
    ("jsonl.bz2", bz2.compress),
    ("jsonl.zst", zstandard.compress),
    ("json.zst", lambda rows: zstandard.compress(rows[:9]) + zstandard.compress(rows[9:])),
]


@pytest.mark.parametrize(("suffix", "pack"), PACKERS)
def test_jsonl_is_read_packed_or_not(tmp_path: Path, suffix: str, pack: Callable[[bytes], bytes]) -> None:
    path = tmp_path / f"rows.{suffix}"
    path.write_bytes(pack(b'{"body": "one", "n": 1}\n\n{"body": "tw\\u00f6"}'))
    assert read(path, "body") == ["one", "twö"]


def test_parquet_is_read_in_order(tmp_path: Path) -> None:
    texts = read(write_parquet(tmp_path / "rows.parquet"))
    assert [text.split()[1] for text in texts] == [str(number) for number in range(1000)]


def test_a_folder_is_read_in_order_of_path_and_nothing_else_in_it(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "1.txt").write_text("third")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "zeroth"}'))
    for other in (".hidden.txt", "notes.md", "model.pkl", "a.json", "x.gz"):
        (tmp_path / other).write_text("not to be read")
    assert read(tmp_path) == ["zeroth", "first", "third"]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b'{"text": "cut', "not valid JSON"),
        (b"plain text", "not valid JSON"),
        (b'{"text": "caf\xe9"}', "not UTF-8: invalid continuation byte at byte 14; convert the file to UTF-8"),
        (b'{"text": "a raw \x01"}', "not valid JSON: Invalid control character at character 17"),
        (b'{"text": ' + b"[" * 100_000, "not readable: the JSON is nested too deep"),
        (b'["text"]', "expected an object with a field 'text', found an array"),
        (b'{"title": "x", "body": "y"}', "no field 'text'; set data.text_field to one of body, title"),
        (b'{"text": 5}', "field 'text' is a number; expected text"),
        (b'{"text": ' + b"5" * 5000 + b"}", "field 'text' is a number; expected text"),
        (b'{"text": true}', "field 'text' is true or false; expected text"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path: Path, line: bytes, complaint: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    documents = local(path).documents()
    assert next(documents) == ("fine", f"{path}:1")
    with pytest.raises(ConfigError) as caught:
        next(documents)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert complaint in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.txt", b"caf\xe9", "not UTF-8"),
        ("a.txt.gz", b"no gzip", "Not a gzipped file"),
        ("a.jsonl.zst", b"no zstd", "damaged or cut short: zstd decompressor error"),
        ("a.jsonl.zst", zstandard.compress(b"{}" * 99)[:-2], "the last Zstandard frame has no end"),
        ("a.txt.bz2", b"no bzip2", "cannot be read: Invalid data stream"),
        ("a.txt.bz2", bz2.compress(b"x" * 100)[:-3], "damaged or cut short"),
        ("a.txt.gz", gzip.compress(b"x" * 100)[:-12], "damaged or cut short"),
        ("a.txt.xz", lzma.compress(bytes(range(256)) * 9)[:-40], "damaged or cut short"),
        ("a.txt.xz", b"no xz at all", "damaged or cut short"),
        ("a.parquet", b"no parquet", "not readable as Parquet"),
        ("a.parquet", b"", "not readable as Parquet"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: bytes, complaint: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_parquet_file_cut_short_is_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "rows.parquet")
    content = bytearray(path.read_bytes())
    content[4:2000] = bytes(1996)
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"rows\.parquet: "):
        read(path)


def test_a_parquet_file_without_the_field_names_its_columns(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "rows.parquet", 2, body=["a", "b"], n=[1, 2])
    with pytest.raises(ConfigError, match=r"no field 'text'; set data\.text_field to one of body, n"):
        read(path)
    with pytest.raises(ConfigError, match=r"row 1: field 'n' is a number"):
        read(path, "n")


@pytest.mark.parametrize("name", ["missing.txt", "picture.png", "empty"])
def test_a_path_that_holds_no_corpus_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "picture.png").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"data\.corpus = "):
        make_source(DataConfig(corpus=str(tmp_path / name)))


def test_identity_changes_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    before = local(path).identity()
    assert before == local(path).identity()
    path.write_text("three")
    assert before != local(path).identity()


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "rows.parquet", 1, text=["a"])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"pip install 'isthmus\[data\]'"):
        read(path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"'c4' needs datasets .*pip install 'isthmus\[data\]'"):
        next(hub_reader.documents("c4", "allenai/c4", "en", "text"))


def test_every_hub_corpus_has_a_dataset() -> None:
    assert set(DATASETS) == set(HUB_CORPORA)


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


def test_novels_and_text_need_no_heavy_import(tmp_path: Path) -> None:
    script = """
import sys
from node.data import DataConfig, open_data
open_data(DataConfig(cache=sys.argv[1]))
print([name for name in ("torch", "datasets", "pyarrow", "transformers") if name in sys.modules])
"""
    assert run_python(script, str(tmp_path)).stdout == "[]\n"


def test_rows_written_as_json_are_the_documents(tmp_path: Path) -> None:
    texts = ["plain", 'quotes " and \\ and \n', "é漢🙂", ""]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    assert read(path) == texts
