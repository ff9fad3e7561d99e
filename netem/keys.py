"""CURVE key pairs: how an endpoint proves who it is, and whom it lets in.

Whoever has a run's token can compute the coordinator's key pair from it (`derived_pair`), and nobody else can finish a
handshake with the coordinator. So the token proves membership and never crosses the network. Keys and secrets are text
of 40 characters (Z85, ZeroMQ's RFC 32).
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass, field
from functools import lru_cache

import zmq
from zmq.utils import z85

_SCRYPT_SALT = b"isthmus key 1"
_SCRYPT_COST = 1 << 14  # 16 MiB and about 50 ms: whoever guesses tokens pays that for each guess


@dataclass(frozen=True)
class KeyPair:
    """A public key and its secret, which is left out of every text about the pair."""

    public: str
    secret: str = field(repr=False)


@dataclass(frozen=True)
class Access:
    """How an endpoint proves who it is, and which callers it lets in.

    With `encrypts`, callers speak CURVE; otherwise they prove by `proof` that they know the secret that the members
    share (`Endpoint.share`). Peers that were dialled with their key may call. Besides them, those may whose keys are
    `invited`, or with None all who know this endpoint's public key.
    """

    pair: KeyPair
    encrypts: bool = True
    invited: frozenset[str] | None = frozenset()


def new_pair() -> KeyPair:
    """A pair that nobody else has."""
    public, secret = zmq.curve_keypair()
    return KeyPair(public.decode(), secret.decode())


def pair_of(secret: str) -> KeyPair:
    """The pair of a secret key."""
    return KeyPair(zmq.curve_public(secret.encode()).decode(), secret)


@lru_cache(maxsize=64)
def derived_pair(secret: str, purpose: str) -> KeyPair:
    """The pair that everyone who knows `secret` can compute; each purpose has another one."""
    return pair_of(z85.encode(_derived(_stretched(secret), purpose)).decode())


def derived_secret(pair: KeyPair, purpose: str) -> str:
    """32 hex digits that only the owner of the pair can compute."""
    return _derived(pair.secret.encode(), purpose).hex()[:32]


def proof(shared: str, caller: str, callee: str) -> str:
    """What `caller` shows to `callee` to prove that it knows the shared secret, without showing that."""
    return hmac.new(shared.encode(), f"{caller}\0{callee}".encode(), hashlib.sha256).hexdigest()


@lru_cache(maxsize=64)
def _stretched(secret: str) -> bytes:
    return hashlib.scrypt(secret.encode(), salt=_SCRYPT_SALT, n=_SCRYPT_COST, r=8, p=1, dklen=32)


def _derived(key: bytes, purpose: str) -> bytes:
    return hashlib.blake2b(purpose.encode(), key=key, digest_size=32).digest()
