"""Sources: every kind of file, every kind of damage, and processes that end cleanly when reading stops early."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from netem.errors import ConfigError
from node.config.data import DataConfig
from node.data import embedded, hub_reader
from node.data.files import EmbeddedNovels, LocalFiles
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
    assert EmbeddedNovels().identity() == {"embedded": "novels.jsonl.xz", "sha256": embedded.NOVELS_SHA256}


def test_damaged_novels_are_no_corpus(tmp_path: Path) -> None:
    (tmp_path / "novels.jsonl.xz").write_bytes(lzma.compress(b'{"text": "others"}'))
    with pytest.raises(ConfigError, match="reinstall isthmus"):
        next(EmbeddedNovels(tmp_path).documents())


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
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "zeroth"}', mtime=0))
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
        ("a.txt.gz", gzip.compress(b"x" * 100, mtime=0)[:-12], "damaged or cut short"),
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


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "rows.parquet", 1, text=["a"])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"pip install 'isthmus\[data\]'"):
        read(path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"'c4' needs datasets .*pip install 'isthmus\[data\]'"):
        next(hub_reader.documents("c4", "allenai/c4", "en", "text"))


def test_rows_written_as_json_are_the_documents(tmp_path: Path) -> None:
    texts = ["plain", 'quotes " and \\ and \n', "é漢🙂", ""]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    assert read(path) == texts
