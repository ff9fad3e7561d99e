"""Tokenizers and the embedded files: the published ids, ordinary text throughout, and no silent damage."""

from __future__ import annotations

import lzma
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from netem.errors import ConfigError
from node.config.data import TOKENIZERS
from node.data import embedded, tokenizers
from node.data.ids import token_dtype
from node.data.tokenizers import ByteTokenizer, Tokenizer, make_tokenizer

TRICKY = "naïve — “quotes”\n\n  two  spaces\t漢字 🙂 it's 1815!   "


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return make_tokenizer(request.param)


def test_gpt2_gives_the_published_ids() -> None:
    gpt2 = make_tokenizer("gpt2")
    assert gpt2.encode_document("Hello world").tolist() == [15496, 995]
    assert (gpt2.vocab_size, gpt2.eot) == (50257, 50256)
    # Every byte alone is a token, in the order of GPT-2's alphabet: '!' first, then the unprintable ones.
    assert gpt2.encode_document("!").tolist() == [0]
    assert gpt2.encode_document("\x00").tolist() == [188]


def test_the_first_merges_alone_are_a_tokenizer() -> None:
    small, whole = make_tokenizer("gpt2-2048"), make_tokenizer("gpt2")
    assert (small.vocab_size, small.eot) == (2048, 2047)
    text = "It is a truth universally acknowledged, that a single man"
    ids = small.encode_document(text).tolist()
    assert max(ids) < 2047
    assert len(whole.encode_document(text)) < len(ids) < len(text)
    assert [small.decode([i]) for i in ids if i < 2047] == [whole.decode([i]) for i in ids if i < 2047]


def test_bytes_are_bytes() -> None:
    assert ByteTokenizer().encode_document("é!").tolist() == [0xC3, 0xA9, 0x21]
    assert (ByteTokenizer.vocab_size, ByteTokenizer.eot) == (257, 256)


def test_text_survives_the_round_trip(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_document(TRICKY)
    assert ids.dtype == np.uint16
    assert tokenizer.decode(ids) == TRICKY


def test_special_tokens_in_text_are_ordinary_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_document("a<|endoftext|>b")
    assert tokenizer.eot not in ids.tolist()
    assert tokenizer.decode(ids) == "a<|endoftext|>b"
    assert tokenizer.decode([*ids[:1], tokenizer.eot]) == "a<|endoftext|>"


def test_empty_text_has_no_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode_document("").tolist() == []


def test_lone_surrogates_do_not_stop_a_run(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode_document("x\ud800y")) == "x\ufffdy"


def test_ids_outside_the_vocabulary_are_refused(tokenizer: Tokenizer) -> None:
    for bad in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=f"token {bad}"):
            tokenizer.decode([bad])


@pytest.mark.parametrize("piece_chars", [1, 7, 64])
def test_encoding_in_pieces_changes_no_token(monkeypatch: pytest.MonkeyPatch, piece_chars: int) -> None:
    text = lzma.decompress(embedded.checked_novels().read_bytes())[:20_000].decode("utf-8", "ignore") + TRICKY
    whole = make_tokenizer("gpt2").encode_document(text)
    monkeypatch.setattr(tokenizers, "_PIECE_CHARS", piece_chars)
    assert len(list(tokenizers._pieces(text))) > 100
    assert make_tokenizer("gpt2").encode_document(text).tolist() == whole.tolist()


MILLION = 1_000_100
"""More characters than the regex engine can take back."""


@pytest.mark.parametrize("run", [" ", "\n", " \n", "\u3000\r\n", "x", "漢"])
def test_a_million_equal_characters_are_tokenised(tokenizer: Tokenizer, run: str) -> None:
    text = f"before{run * (MILLION // len(run))}after"
    ids = tokenizer.encode_document(text)
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("run", [" ", "\n", " \n\t", "\u2028 "])
def test_a_run_of_blanks_gives_the_tokens_of_the_whole_pattern(run: str) -> None:
    gpt2 = tokenizers.Gpt2Tokenizer("gpt2", embedded.load_merges())
    for end in ("", "after", "!"):
        text = f"before{run * 60_000}{end}"  # short enough for the engine
        assert gpt2.encode_document(text).tolist() == gpt2._encode(text).tolist()


@pytest.mark.parametrize("longest", [1, 2, 3])
def test_bounded_matches_change_no_token(monkeypatch: pytest.MonkeyPatch, longest: int) -> None:
    monkeypatch.setattr(tokenizers, "_LONGEST_RUN", longest)
    gpt2 = tokenizers.Gpt2Tokenizer("gpt2", embedded.load_merges())
    draw = random.Random(longest)
    cut = 0
    for _ in range(500):
        text = "".join(
            draw.choices(
                [*" \n\t\r\x0b\x1c\x1f\x85\xa0\u1680\u200a\u200b\u2028\u3000\ufeff", "it's", "a", "7", "é", "!"], k=40
            )
        )
        cut += len(list(tokenizers._short_runs(text))) > 3
        assert gpt2.encode_document(text).tolist() == gpt2._encode(text).tolist()
    assert cut > 400


def test_ids_are_stored_as_narrow_as_they_fit() -> None:
    assert token_dtype(1 << 16) == np.dtype("<u2")
    assert token_dtype((1 << 16) + 1) == np.dtype("<u4")


def test_unknown_tokenizer_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"data\.tokenizer = 'llama'.*gpt2, gpt2-2048, bytes"):
        make_tokenizer("llama")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for name in (embedded.NOVELS, embedded.MERGES):
        shutil.copy(embedded.FOLDER / name, tmp_path / name)
    return tmp_path


def test_intact_copies_pass(copy: Path) -> None:
    assert embedded.checked_novels(copy) == copy / embedded.NOVELS
    assert embedded.load_merges(copy).startswith("#version: 0.2\n")


def test_changed_novels_are_noticed(copy: Path) -> None:
    content = bytearray((copy / embedded.NOVELS).read_bytes())
    content[1000] ^= 1
    (copy / embedded.NOVELS).write_bytes(content)
    with pytest.raises(ConfigError, match=r"novels\.jsonl\.xz: sha256 is .* expected 30f5e7b5f9f1a056"):
        embedded.checked_novels(copy)


def test_changed_merges_are_noticed(copy: Path) -> None:
    merges = lzma.decompress((copy / embedded.MERGES).read_bytes()).replace(b"h e\n", b"e h\n", 1)
    (copy / embedded.MERGES).write_bytes(lzma.compress(merges))
    with pytest.raises(ConfigError, match=r"gpt2-vocab\.bpe\.xz: sha256 is .* expected 1ce1664773c50f3e"):
        embedded.load_merges(copy)


@pytest.mark.parametrize("damage", ["cut", "noise", "missing"])
def test_unreadable_merges_are_noticed(copy: Path, damage: str) -> None:
    path = copy / embedded.MERGES
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(content[:1000] if damage == "cut" else b"not xz")
    with pytest.raises(ConfigError, match="reinstall isthmus"):
        embedded.load_merges(copy)


def test_the_notice_ships_with_the_data() -> None:
    assert "public domain" in (embedded.FOLDER / "NOTICE.md").read_text(encoding="utf-8")
