"""Files as people have them, after public bug reports: marks, nulls, odd values, arrays, separators, and folders."""

from __future__ import annotations

import gzip
import json
import logging
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from netem.errors import ConfigError
from node.config.data import DataConfig
from node.data import open_data
from node.data.corpus import Corpus
from node.data.files import LocalFiles
from node.data.sources import make_source


def read(path: Path, text_field: str = "text", separator: str = "") -> list[str]:
    config = DataConfig(corpus=str(path), text_field=text_field, separator=separator)
    return [document.text for document in LocalFiles(config).documents()]


def refusal(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("row", "text"),
    [
        (b'\xef\xbb\xbf{"text": "after a mark"}', "after a mark"),
        (b'{"text": "cut in an emoji \\ud83d"}', "cut in an emoji \ufffd"),
        (b'{"text": "\\udc00 and \\ud83d\\ude00"}', "\ufffd and \U0001f600"),
        (b'{"text": "scored", "score": NaN, "other": -Infinity}', "scored"),
        (b'{"text": "long", "id": 123456789012345678901234567890}', "long"),
        (b'{"text": "longer", "id": ' + b"7" * 5000 + b"}", "longer"),
        (b'{"text": "one", "text": "two"}', "two"),
        ('{"text": "a noncharacter \uffff"}'.encode(), "a noncharacter \uffff"),
    ],
)
def test_only_the_text_of_a_row_matters(tmp_path: Path, row: bytes, text: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(row + b'\n{"text": "next"}\r\n')
    assert read(path) == [text, "next"]


def test_a_mark_is_refused_in_any_other_place(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "one"}\n\xef\xbb\xbf{"text": "two"}\n')
    assert refusal(path).startswith(f"{path}:2: not valid JSON")


def test_null_texts_are_skipped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows, table = tmp_path / "rows.jsonl", tmp_path / "rows.parquet"
    rows.write_text('{"text": "one"}\n{"text": null}\n{"text": null}\n{"text": "four"}\n')
    pq.write_table(pa.table({"text": ["one", None, None, "four"]}), table)
    for path in (rows, table):
        caplog.clear()
        documents = LocalFiles(DataConfig(corpus=str(path))).documents()
        assert [document.text for document in documents] == ["one", "four"]
        assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == [
            f"{path}: rows skipped because their text is null: 2"
        ]


def test_the_place_of_a_row_counts_those_that_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": ["one", None, "three"]}), path)
    documents = LocalFiles(DataConfig(corpus=str(path))).documents()
    assert [document.place for document in documents] == [f"{path}, row 1", f"{path}, row 3"]


@pytest.mark.parametrize("array", ['[\n {\n  "text": "x"\n },\n {\n  "text": "y"\n }\n]', '\n [{"text": "x"}]\n'])
def test_an_array_of_rows_is_refused_as_one(tmp_path: Path, array: str) -> None:
    path = tmp_path / "array.jsonl"
    path.write_text(array)
    assert "the file is a JSON array; expected one object a line; convert it with: jq" in refusal(path)


def test_an_object_over_several_lines_is_told_that_a_row_is_one(tmp_path: Path) -> None:
    path = tmp_path / "pretty.jsonl"
    path.write_text('{\n "text": "x"\n}\n')
    message = refusal(path)
    assert message.startswith(f"{path}:1: not valid JSON")
    assert "one whole object a line" in message


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"fine\ncaf\xe9 au lait", ":2: not UTF-8 text"),
        ("fine".encode("utf-16-le"), ":1: has a zero byte, so it is binary or UTF-16"),
        (b"\x7fELF\n\n\x00\x01", ":3: has a zero byte"),
    ],
)
def test_text_that_is_none_is_refused_by_line(tmp_path: Path, content: bytes, complaint: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    assert f"{path}{complaint}" in refusal(path)


TEXTS = ["one", "two", "three"]


@pytest.mark.parametrize(
    "column",
    [
        pa.array(TEXTS).dictionary_encode(),
        pa.array(TEXTS, pa.large_string()),
        pa.array(TEXTS, pa.string_view()),
    ],
    ids=["dictionary", "large", "view"],
)
@pytest.mark.parametrize("name", ["text", "text.raw"])
def test_every_parquet_column_of_text_is_read(tmp_path: Path, column: pa.Array, name: str) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"id": [1, 2, 3], name: column}), path)
    assert read(path, name) == TEXTS


def test_a_parquet_column_of_bytes_is_refused_by_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": pa.array([b"one"], pa.binary())}), path)
    assert refusal(path) == f"{path}, row 1: field 'text' is bytes; expected text"


def test_a_parquet_file_without_rows_has_no_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), path)
    with pytest.raises(ConfigError, match="has no text"):
        open_data(DataConfig(corpus=str(path), cache=str(tmp_path / "cache")))


STORIES = "Once.\n<|endoftext|>\nTwice.\n\nEnd.\n<|endoftext|>\n"


def test_separators_in_a_text_file_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "stories.txt"
    path.write_text(STORIES)
    assert read(path) == [STORIES]
    assert f"{path}: holds '<|endoftext|>' 2 times, read as ordinary text" in caplog.text
    assert "data.separator = '<|endoftext|>'" in caplog.text


def test_a_text_file_is_split_where_the_setting_says(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "stories.txt"
    path.write_text(STORIES)
    config = DataConfig(corpus=str(path), separator="<|endoftext|>", tokenizer="bytes", cache=str(tmp_path / "cache"))
    documents = list(LocalFiles(config).documents())
    assert [document.text for document in documents] == ["Once.", "Twice.\n\nEnd.", ""]
    assert documents[1].place == f"{path}, document 2"
    assert "ordinary text" not in caplog.text
    whole, split = open_data(DataConfig(corpus=str(path), tokenizer="bytes", cache=config.cache)), open_data(config)
    assert isinstance(split, Corpus)
    assert (split.train == split.tokenizer.eot).sum() == 2  # "" is no document
    assert split.fingerprint != whole.fingerprint  # another store, though the file is the same


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as downloads leave one."""
    root = tmp_path / "corpus"
    for name in (".ipynb_checkpoints", "chunk1/.cache", "chunk2"):
        (root / name).mkdir(parents=True)
    (root / "LICENSE.txt").write_text("not to be learned")
    (root / "readme.TXT").write_text("not to be learned")
    (root / "notes.md").write_text("not read")
    (root / "dataset_info.json").write_text("{}")
    (root / ".ipynb_checkpoints" / "a-checkpoint.txt").write_text("an old draft")
    (root / "chunk1" / ".cache" / "b.txt").write_text("an old draft")
    (root / "chunk1" / ".b.txt").write_text("an old draft")
    (root / "chunk1" / "B.JSONL").write_text('{"text": "upper"}')
    (root / "chunk1" / "c4-train.00000.json.gz").write_bytes(gzip.compress(b'{"text": "c4"}'))
    (root / "chunk1" / "part-0.jsonl.zst").write_bytes(zstandard.compress(b'{"text": "part"}'))
    (root / "chunk2" / "license.jsonl").write_text('{"text": "rows are read whatever their name is"}')
    return root


def test_a_folder_is_read_whole_but_for_what_is_no_corpus(folder: Path) -> None:
    assert read(folder) == ["upper", "c4", "part", "rows are read whatever their name is"]


def test_what_is_read_and_left_out_of_a_folder_is_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    os.symlink(folder / "nowhere", folder / "gone.txt")
    read(folder)
    reads, leaves = [record.getMessage() for record in caplog.records]
    assert reads == (
        f"{folder}: reads 4 files: chunk1/B.JSONL, chunk1/c4-train.00000.json.gz, chunk1/part-0.jsonl.zst, "
        "chunk2/license.jsonl"
    )
    assert leaves.startswith(f"{folder}: leaves out 8: ")
    for said in (
        ".ipynb_checkpoints (hidden)",
        "chunk1/.cache (hidden)",
        "chunk1/.b.txt (hidden)",
        "LICENSE.txt (not part of a corpus, by its name)",
        "readme.TXT (not part of a corpus, by its name)",
        "notes.md (not a kind of file that is read)",
        "dataset_info.json (not a kind of file that is read)",
        "gone.txt (not a file, or a link to nothing)",
    ):
        assert said in leaves


def test_a_long_list_of_files_is_cut(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for number in range(30):
        (tmp_path / f"{number:02}.txt").write_text("text")
    assert len(read(tmp_path)) == 30
    assert caplog.messages == [
        f"{tmp_path}: reads 30 files: {', '.join(f'{number:02}.txt' for number in range(20))} and 10 more"
    ]


def test_a_hidden_or_licence_file_that_is_named_itself_is_read(folder: Path) -> None:
    assert read(folder / "LICENSE.txt") == ["not to be learned"]
    assert read(folder / "chunk1" / ".b.txt") == ["an old draft"]
    assert read(folder / ".ipynb_checkpoints") == ["an old draft"]


def test_linked_folders_are_read_once_and_never_in_a_circle(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    elsewhere, root = tmp_path / "elsewhere", tmp_path / "corpus"
    (elsewhere / "deep").mkdir(parents=True)
    (elsewhere / "deep" / "a.txt").write_text("linked")
    root.mkdir()
    (root / "z.txt").write_text("own")
    os.symlink(elsewhere, root / "link")
    os.symlink(elsewhere / "deep", root / "twice")
    os.symlink(root, elsewhere / "back")
    os.symlink(root / "z.txt", root / "y.txt")
    assert read(root) == ["linked", "own", "own"]
    assert "link/back (a link to a folder that is read already)" in caplog.text
    assert "twice (a link to a folder that is read already)" in caplog.text


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shut").mkdir()
    (tmp_path / "a.txt").write_text("open")
    listed = os.scandir

    def scandir(path: str) -> object:
        if str(path).endswith("shut"):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ConfigError, match=r"Permission denied \(.*shut\)"):
        make_source(DataConfig(corpus=str(tmp_path)))


def test_two_machines_read_a_folder_in_the_same_order(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, walk = read(folder), os.walk

    def shuffled(*arguments: object, **options: object) -> object:
        for here, folders, files in walk(*arguments, **options):  # type: ignore[call-overload]
            folders.reverse()
            yield here, folders, files[::-1]

    monkeypatch.setattr(os, "walk", shuffled)
    assert read(folder) == expected


def test_a_window_wider_than_the_library_takes_by_itself_is_read(tmp_path: Path) -> None:
    path = tmp_path / "long.txt.zst"
    wide = zstandard.ZstdCompressionParameters(window_log=28, write_content_size=0)
    packer = zstandard.ZstdCompressor(compression_params=wide).compressobj()
    path.write_bytes(packer.compress(b"with zstd --long=28") + packer.flush())
    assert read(path) == ["with zstd --long=28"]


def test_the_home_folder_may_be_written_as_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("at home")
    assert read(Path("~/a.txt")) == ["at home"]


@pytest.mark.parametrize("change", ["name", "size", "time", "field", "separator"])
def test_whatever_may_change_the_documents_changes_the_identity(tmp_path: Path, change: str) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    os.utime(path, ns=(0, 1_000_000_000))
    before = LocalFiles(DataConfig(corpus=str(path))).identity()
    assert LocalFiles(DataConfig(corpus=str(path))).identity() == before
    if change == "name":
        path = path.rename(tmp_path / "b.txt")
    elif change == "size":
        path.write_text("three")
    os.utime(path, ns=(0, 2_000_000_000 if change == "time" else 1_000_000_000))
    field, separator = "body" if change == "field" else "text", "--" if change == "separator" else ""
    assert LocalFiles(DataConfig(corpus=str(path), text_field=field, separator=separator)).identity() != before


def test_a_packed_file_of_many_blocks_is_read_row_by_row_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.zst"
    path.write_bytes(zstandard.compress(b"".join(json.dumps({"text": str(n)}).encode() + b"\n" for n in range(99_999))))
    documents = LocalFiles(DataConfig(corpus=str(path))).documents()
    assert [next(documents).text for _ in range(3)] == ["0", "1", "2"]
    assert [document.text for document in documents] == [str(number) for number in range(3, 99_999)]
