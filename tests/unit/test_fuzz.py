"""Whatever bytes come, decoders and machines take them or say `ProtocolError`; also those of the fuzzer's corpus."""

from __future__ import annotations

import pytest
from fuzz.targets import EXAMPLES, TARGETS, driven
from helpers import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

CORPUS = ROOT / "tests" / "fuzz" / "corpus"

groups = st.tuples(st.integers(0, 4095).map(lambda place: place.to_bytes(2, "big")), st.binary(min_size=2, max_size=2))
damages = st.lists(groups.map(b"".join), max_size=8).map(b"".join)


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_no_bytes_do_worse_than_a_protocol_error(name: str, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, 255), label="first byte")
    rest = data.draw(st.binary(max_size=300) if first & 1 else damages, label="rest")
    driven(name)(bytes([first]) + rest)


@pytest.mark.parametrize("name", TARGETS)
def test_the_kept_corpus_is_taken_or_refused(name: str) -> None:
    files = sorted((CORPUS / name).iterdir())
    assert files, "python tests/fuzz/run.py makes it"
    for file in files:
        driven(name)(file.read_bytes())


@pytest.mark.parametrize("name", TARGETS)
def test_every_example_is_well_formed(name: str) -> None:
    """Or the fuzzers would start from nothing."""
    assert EXAMPLES[name]
    for example in EXAMPLES[name]:
        TARGETS[name](example)
