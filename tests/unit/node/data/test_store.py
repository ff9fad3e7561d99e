"""The token store: built once by whoever comes first, the split never mixed, and nothing half-made left behind."""

from __future__ import annotations

import itertools
import json
import logging
import multiprocessing
import os
from collections.abc import Iterable, Iterator
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock

from netem.errors import ConfigError, IsthmusError
from node.data import DataConfig, open_data, store
from node.data.build import Built, build
from node.data.documents import Document, Documents
from node.data.split import is_heldout
from node.data.store import TokenStore
from node.data.tokenizers import ByteTokenizer, Tokenizer, make_tokenizer

EOT = ByteTokenizer.eot
LIMIT_S = 60


class Listed:
    """A source of given texts that notes in a file each time it is read."""

    name = "listed"
    default_max_tokens = 0

    def __init__(self, texts: list[str], log: Path | None = None) -> None:
        self._texts = texts
        self._log = log

    def identity(self) -> dict[str, Any]:
        return {"texts": self._texts}

    def documents(self) -> Documents:
        if self._log is not None:
            with self._log.open("a") as file:
                file.write(f"{os.getpid()}\n")
        yield from placed(self._texts)


def placed(texts: Iterable[str]) -> Iterator[Document]:
    return (Document(text, f"text {number}") for number, text in enumerate(texts, start=1))


def texts(count: int, start: int = 0) -> list[str]:
    return [f"<document {number}: {'words ' * (number % 7)}>" for number in range(start, start + count)]


def open_store(cache: Path, documents: list[str], **options: Any) -> TokenStore:
    return TokenStore.open(Listed(documents), ByteTokenizer(), cache, **options)


def documents_of(tokens: np.ndarray[Any, Any]) -> list[str]:
    """The documents in a part, which must end with end-of-text."""
    assert len(tokens) == 0 or tokens[-1] == EOT
    parts = np.split(tokens, np.flatnonzero(tokens == EOT) + 1)[:-1]
    return [ByteTokenizer().decode(part[:-1]) for part in parts]


def test_whole_documents_are_held_out_of_a_large_corpus(tmp_path: Path) -> None:
    documents = texts(1000)
    store = open_store(tmp_path, documents)
    train, heldout = documents_of(store.train), documents_of(store.heldout)
    assert sorted(train + heldout) == sorted(documents)
    assert set(train).isdisjoint(heldout)
    assert train == [text for text in documents if not is_heldout(text)]
    assert 70 < len(heldout) < 130


@pytest.mark.parametrize(("count", "split"), [(99, "tails"), (100, "documents")])
def test_the_rule_changes_at_a_hundred_documents(tmp_path: Path, count: int, split: str) -> None:
    store = open_store(tmp_path, texts(count))
    assert (store.meta.split, store.meta.documents) == (split, count)


def test_the_last_tenth_of_each_document_is_held_out_of_a_small_corpus(tmp_path: Path) -> None:
    store = open_store(tmp_path, ["a" * 90 + "b" * 10, "", "c" * 19, "short"])
    assert documents_of(store.train) == ["a" * 90, "c" * 18, "short"]
    assert documents_of(store.heldout) == ["b" * 10, "c"]


def test_the_rule_of_the_split_is_pinned() -> None:
    """Golden figures: a change here means SPLIT_VERSION must rise, or held-out text is trained on."""
    assert [number for number in range(100) if is_heldout(f"document {number}")] == [
        5,
        28,
        29,
        31,
        39,
        40,
        45,
        61,
        65,
        88,
        89,
        94,
        95,
        96,
        97,
    ]


def test_a_document_keeps_its_side_when_the_corpus_grows(tmp_path: Path) -> None:
    before = open_store(tmp_path, texts(300))
    after = open_store(tmp_path, texts(300, start=1000) + texts(300))
    assert set(documents_of(before.heldout)) <= set(documents_of(after.heldout))
    assert set(documents_of(before.heldout)).isdisjoint(documents_of(after.train))


@pytest.mark.parametrize("count", [10, 150])
def test_reading_stops_at_max_tokens(tmp_path: Path, count: int) -> None:
    store = open_store(tmp_path, ["x" * 10] * count, max_tokens=73)
    assert np.count_nonzero(np.concatenate([store.train, store.heldout]) != EOT) == 73
    assert store.meta.documents == 8


def test_an_endless_source_is_read_only_as_far_as_needed(tmp_path: Path) -> None:
    endless = placed(f"document {number}" for number in itertools.count())
    built = build(endless, ByteTokenizer(), 5000, tmp_path)
    assert built.split == "documents"
    assert next(endless).text == f"document {built.documents}"  # not one more than needed was taken
    assert sorted(path.name for path in tmp_path.iterdir()) == ["heldout.bin", "train.bin"]


def test_documents_are_taken_one_at_a_time(tmp_path: Path) -> None:
    encoded: list[str] = []

    class Counting(ByteTokenizer):
        def encode_document(self, text: str) -> Any:
            encoded.append(text)
            return super().encode_document(text)

    def documents() -> Iterator[str]:
        for number, text in enumerate(texts(250)):
            assert len(encoded) == number, "the next document was asked for before the last was encoded"
            yield text

    built = build(placed(documents()), Counting(), 0, tmp_path)
    assert built.documents == len(encoded) == 250


def test_ids_beyond_16_bits_are_stored_in_32(tmp_path: Path) -> None:
    class Wide(ByteTokenizer):
        name = "wide"
        vocab_size = 100_001
        eot = 100_000

        def encode_document(self, text: str) -> Any:
            return np.frombuffer(text.encode(), dtype=np.uint8).astype("<u4") + 99_000

    store = TokenStore.open(Listed(["abc"]), Wide(), tmp_path)
    assert store.train.dtype == np.dtype("<u4")
    assert store.train.tolist() == [99_097, 99_098, 99_099, 100_000]


def test_the_fingerprint_is_of_tokens_and_tokenizer_only(tmp_path: Path) -> None:
    novels = [tmp_path / name for name in ("one.txt", "other.txt")]
    for path in novels:
        path.write_text("the same words " * 50)
    prints = [
        open_data(DataConfig(corpus=str(path), tokenizer=name, cache=str(tmp_path / "cache"))).fingerprint
        for path in novels
        for name in ("gpt2", "bytes")
    ]
    assert prints[:2] == prints[2:]
    assert prints[0] != prints[1]
    novels[0].write_text("the same words " * 49 + "the same worse ")
    changed = open_data(DataConfig(corpus=str(novels[0]), cache=str(tmp_path / "cache"))).fingerprint
    assert changed != prints[0]


def test_the_embedded_corpus_opens_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path))
    corpus = open_data(DataConfig())
    assert (len(corpus.train), len(corpus.heldout)) == (1_095_039, 121_674)
    assert corpus.tokenizer.decode(corpus.train[:8]) == "EMMA\n\nBy Jane Austen"
    ends = [np.count_nonzero(part == corpus.tokenizer.eot) for part in (corpus.train, corpus.heldout)]
    assert ends == [7, 7]
    assert not corpus.train.flags.writeable


def test_a_store_is_built_once_and_then_only_mapped(tmp_path: Path) -> None:
    log = tmp_path / "log"
    first, second = (TokenStore.open(Listed(texts(5), log), ByteTokenizer(), tmp_path / "cache") for _ in range(2))
    assert len(log.read_text().split()) == 1
    assert first.fingerprint == second.fingerprint
    np.testing.assert_array_equal(first.train, second.train)


@pytest.mark.parametrize("change", ["tokenizer", "max_tokens", "texts"])
def test_whatever_decides_the_tokens_decides_the_folder(tmp_path: Path, change: str) -> None:
    tokenizer: Tokenizer = make_tokenizer("gpt2") if change == "tokenizer" else ByteTokenizer()
    documents = texts(4 if change == "texts" else 3)
    other = TokenStore.open(Listed(documents), tokenizer, tmp_path, max_tokens=5 if change == "max_tokens" else 0)
    assert other.folder != open_store(tmp_path, texts(3)).folder


def _open_at_once(cache: Path, log: Path, barrier: Barrier, results: Any) -> None:
    barrier.wait(LIMIT_S)
    store = TokenStore.open(Listed(texts(400), log), ByteTokenizer(), cache, lock_timeout_s=LIMIT_S)
    results.put((store.fingerprint, len(store.train), len(store.heldout)))


def test_processes_that_start_together_build_it_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(3), context.Queue()
    log = tmp_path / "log"
    processes = [
        context.Process(target=_open_at_once, args=(tmp_path / "cache", log, barrier, results)) for _ in range(3)
    ]
    for process in processes:
        process.start()
    found = [results.get(timeout=LIMIT_S) for _ in processes]
    for process in processes:
        process.join(LIMIT_S)
        assert process.exitcode == 0
    assert len(set(found)) == 1
    assert len(log.read_text().split()) == 1


def unheld_lock(cache: Path, documents: list[str]) -> FileLock:
    """The lock of the store of `documents`, as another process would take it; the store is to be built again."""
    folder = open_store(cache, documents).folder
    (folder / "meta.json").unlink()
    return FileLock(folder.with_name(f"{folder.name}.lock"), is_singleton=False)


def test_a_builder_that_never_ends_is_not_awaited_for_ever(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="node.data.store")
    with unheld_lock(tmp_path, texts(3)), pytest.raises(IsthmusError, match=r"another process .* over 0\.1 s"):
        open_store(tmp_path, texts(3), lock_timeout_s=0.1)
    assert "waiting for another process to tokenise the corpus" in caplog.text
    assert open_store(tmp_path, texts(3), lock_timeout_s=0.1).meta.documents == 3


def test_a_document_that_the_tokenizer_refuses_is_named(tmp_path: Path) -> None:
    class Refusing(ByteTokenizer):
        def encode_document(self, text: str) -> Any:
            if text == "bad":
                raise ValueError("no such text")
            return super().encode_document(text)

    with pytest.raises(ConfigError, match=r"^text 2: the tokenizer bytes cannot read this text: no such text$"):
        build(placed(["fine", "bad"]), Refusing(), 0, tmp_path)


def test_everything_is_on_disk_before_the_store_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, fsync = [], os.fsync

    def noted(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        synced.append((path.parent.suffix, path.name))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    open_store(tmp_path, texts(3))
    assert sorted(synced[:2]) == [(".partial", "heldout.bin"), (".partial", "train.bin")]
    assert synced[2:] == [(".partial", "meta.json")]


@pytest.mark.parametrize("version", ["SPLIT_VERSION", "STORE_VERSION"])
def test_an_old_store_is_not_taken_for_one_of_a_new_rule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    before = open_store(tmp_path, texts(3))
    monkeypatch.setattr(store, version, 99)
    assert open_store(tmp_path, texts(3)).folder != before.folder


def test_the_fingerprint_tells_every_part_of_the_store(tmp_path: Path) -> None:
    class Renamed(ByteTokenizer):
        name = "renamed"

    class Wider(ByteTokenizer):
        vocab_size = 258

    text = "x" * 90 + "y" * 10
    prints = [
        TokenStore.open(Listed([document]), tokenizer, tmp_path).fingerprint
        for tokenizer, document in [
            (ByteTokenizer(), text),
            (Renamed(), text),
            (Wider(), text),
            (ByteTokenizer(), "z" + text[1:]),  # other training tokens
            (ByteTokenizer(), text[:-1] + "z"),  # other held-out tokens
        ]
    ]
    assert len(set(prints)) == 5


def test_the_fingerprint_is_pinned(tmp_path: Path) -> None:
    """Golden: a change here means that no old checkpoint knows its corpus again."""
    assert open_store(tmp_path, texts(3)).fingerprint == "907a16bdb73c8df6c47181ebb86b9854"


def test_a_source_may_bound_what_is_read_of_it(tmp_path: Path) -> None:
    class Endless(Listed):
        default_max_tokens = 20

    assert TokenStore.open(Endless(["x" * 15] * 3), ByteTokenizer(), tmp_path).meta.documents == 2
    asked_for = TokenStore.open(Endless(["x" * 15] * 3), ByteTokenizer(), tmp_path, max_tokens=40)
    assert asked_for.meta.documents == 3


def test_a_failed_build_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    class Failing(Listed):
        def documents(self) -> Documents:
            yield from super().documents()
            raise ConfigError("rows.jsonl:9: broken")

    with pytest.raises(ConfigError, match=r"rows\.jsonl:9"):
        TokenStore.open(Failing(texts(200)), ByteTokenizer(), tmp_path)
    assert [path.suffix for path in (tmp_path / "tokens").iterdir()] == [".lock"]
    assert open_store(tmp_path, texts(200)).meta.documents == 200


def test_what_a_killed_builder_left_is_cleared_away(tmp_path: Path) -> None:
    whole = open_store(tmp_path, texts(3))
    (whole.folder / "meta.json").unlink()
    partial = whole.folder.with_name(f"{whole.folder.name}.partial")
    partial.mkdir()
    (partial / "train.bin").write_bytes(b"half")
    again = open_store(tmp_path, texts(3))
    assert again.fingerprint == whole.fingerprint
    assert not partial.exists()


def test_the_source_is_closed_when_reading_stops_early(tmp_path: Path) -> None:
    stores_when_closed = []

    class Watched(Listed):
        def documents(self) -> Documents:
            try:
                yield from super().documents()
            finally:
                stores_when_closed.append(list(tmp_path.rglob("meta.json")))

    store = TokenStore.open(Watched(texts(200)), ByteTokenizer(), tmp_path, max_tokens=50)
    assert store.meta.documents < 200
    assert stores_when_closed == [[]]  # closed before the store was finished, not by the collector later


@pytest.mark.parametrize("damage", ["meta", "train"])
def test_a_damaged_store_says_what_to_delete(tmp_path: Path, damage: str) -> None:
    folder = open_store(tmp_path, texts(3)).folder
    path = folder / ("meta.json" if damage == "meta" else "train.bin")
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ConfigError, match=f"{path.name}.*delete {folder}"):
        open_store(tmp_path, texts(3))


def test_meta_is_readable_and_complete(tmp_path: Path) -> None:
    store = open_store(tmp_path, texts(3))
    meta = json.loads((store.folder / "meta.json").read_text())
    assert meta["train_tokens"] == len(store.train)
    assert meta["heldout_tokens"] == len(store.heldout)
    assert meta["fingerprint"] == store.fingerprint


@pytest.mark.parametrize("documents", [[], ["", ""]])
def test_a_corpus_without_text_is_refused(tmp_path: Path, documents: list[str]) -> None:
    with pytest.raises(ConfigError, match="has no text"):
        open_store(tmp_path, documents)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"data\.cache = .*file.*ISTHMUS_CACHE"):
        open_store(tmp_path / "file", texts(3))


def test_an_empty_part_is_an_empty_array(tmp_path: Path) -> None:
    store = open_store(tmp_path, ["abc"])
    assert (len(store.train), len(store.heldout)) == (4, 0)


def test_built_counts_are_those_of_the_files(tmp_path: Path) -> None:
    built = build(placed(texts(120)), ByteTokenizer(), 0, tmp_path)
    assert isinstance(built, Built)
    assert built.train_tokens * 2 == (tmp_path / "train.bin").stat().st_size
    assert built.heldout_tokens * 2 == (tmp_path / "heldout.bin").stat().st_size
