"""Whatever bytes come, decoders and machines take them or say `ProtocolError`; also those of the fuzzer's corpus."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz.targets import EXAMPLES, TARGETS
from helpers import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

CORPUS = ROOT / "tests" / "fuzz" / "corpus"

edit = st.tuples(st.integers(0, 4095), st.integers(0, 255), st.sampled_from(["set", "cut", "put"]))
edits = st.lists(edit, max_size=8)


def edited(data: bytes, changes: list[tuple[int, int, str]]) -> bytes:
    """A well-formed input, damaged in some places."""
    body = bytearray(data)
    for place, byte, how in changes:
        place = place % (len(body) + 1)
        if how == "set" and place < len(body):
            body[place] = byte
        elif how == "cut":
            del body[place : place + byte]
        else:
            body.insert(place, byte)
    return bytes(body)


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_no_bytes_do_worse_than_a_protocol_error(name: str, data: st.DataObject) -> None:
    if data.draw(st.booleans(), label="from an example"):
        sample = data.draw(st.sampled_from(EXAMPLES[name]), label="example")
        TARGETS[name](edited(sample, data.draw(edits, label="edits")))
    else:
        TARGETS[name](data.draw(st.binary(max_size=300), label="bytes"))


@pytest.mark.parametrize("name", TARGETS)
def test_the_kept_corpus_is_taken_or_refused(name: str) -> None:
    files = sorted((CORPUS / name).iterdir())
    assert files, "python tests/fuzz/run.py makes it"
    for file in files:
        TARGETS[name](Path(file).read_bytes())


@pytest.mark.parametrize("name", TARGETS)
def test_every_example_is_well_formed(name: str) -> None:
    """Or the fuzzers would start from nothing."""
    assert EXAMPLES[name]
    for example in EXAMPLES[name]:
        TARGETS[name](example)
