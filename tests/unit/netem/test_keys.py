"""Keys that people share by a secret, names that belong to keys, and proofs without the secret in them."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netem.endpoint import unique
from netem.keys import Access, derived_pair, derived_secret, new_pair, pair_of, proof
from netem.names import certifies, plain

NAMES = st.text(string.ascii_letters + string.digits + "._-()", min_size=1, max_size=64)


def test_all_who_have_a_secret_make_the_same_pair_and_nobody_else_does() -> None:
    pair = derived_pair("token", "coordinator")
    derived_pair.cache_clear()
    assert derived_pair("token", "coordinator") == pair
    others = {derived_pair("token", "operator"), derived_pair("Token", "coordinator"), new_pair(), new_pair()}
    assert len({pair, *others}) == 5
    assert pair_of(pair.secret) == pair


def test_a_secret_is_in_no_text_about_a_pair() -> None:
    pair = new_pair()
    assert pair.secret not in f"{pair} {pair!r} {Access(pair)}"
    assert pair.public in repr(pair)


def test_what_only_the_owner_can_compute() -> None:
    pair = new_pair()
    assert derived_secret(pair, "members") == derived_secret(pair, "members") != derived_secret(pair, "others")
    assert derived_secret(new_pair(), "members") != derived_secret(pair, "members")


def test_a_proof_is_of_one_caller_to_one_callee_with_one_secret() -> None:
    shown = {proof(shared, *ends) for shared in ("s", "t") for ends in (("a", "b"), ("b", "a"), ("ab", ""), ("", "ab"))}
    assert len(shown) == 8


@given(NAMES)
def test_a_name_belongs_to_one_key(name: str) -> None:
    key, other = "k" * 40, "K" * 40
    peer = unique(name, key)
    assert plain(peer) == name
    assert certifies(peer, key)
    assert not certifies(peer, other)
    assert not certifies(peer.replace(name, name + "x", 1), key)
    assert unique(name, key) != peer


@pytest.mark.parametrize("peer", ["", "~", "node-0", "node-0~", "node-0~0123", "node-0~" + "0" * 32, "é~0123456789é"])
def test_a_name_without_a_digest_belongs_to_nobody(peer: str) -> None:
    assert not certifies(peer, "k" * 40)
    assert not certifies(peer, "")
