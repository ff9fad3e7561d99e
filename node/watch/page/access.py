"""Who may see a run's page, and who may change the run's network through it. No I/O; the time comes in.

There are two secrets, one to look and one to look and control; neither is the run's token. A browser trades one for a
session: a cookie that scripts cannot read and other sites cannot send (HttpOnly, SameSite=Strict), and a token that
every request which changes something must repeat in a header, so that a foreign page cannot make one (OWASP, Cross-Site
Request Forgery Prevention). A program sends the secret itself as a bearer token (RFC 6750). A request whose Host is not
one of the page's own names is refused, so that a foreign name that resolves to this address gains nothing (DNS
rebinding).
"""

from __future__ import annotations

import hmac
import secrets
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

MOST_SESSIONS = 256
SESSION_S = 12 * 3600.0
WRONG_IN_A_MINUTE = 20
"""After so many wrong secrets in a minute, none is looked at until it is over."""


class Role(IntEnum):
    """What a visitor may do; each includes those before it."""

    NOBODY = 0
    READER = 1
    OPERATOR = 2


@dataclass(frozen=True)
class Keys:
    """The page's two secrets."""

    read: str
    control: str


@dataclass(frozen=True)
class Session:
    """A browser that has given a secret."""

    role: Role
    csrf: str
    until_s: float


class TooManyWrong(Exception):
    """Wrong secrets come too fast."""


def new_keys() -> Keys:
    """Two secrets of 144 bits each."""
    return Keys(secrets.token_urlsafe(18), secrets.token_urlsafe(18))


class Access:
    """The sessions of one page, and the decision about each request. `now_s` never goes back."""

    def __init__(self, keys: Keys, hosts: Iterable[str]) -> None:
        """`hosts` are the page's names with their ports, as browsers put them in Host."""
        self._keys = keys
        self._hosts = frozenset(host.lower() for host in hosts)
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._wrong_s: list[float] = []

    def knows_host(self, host: str) -> bool:
        """Whether a request's Host header names this page."""
        return host.lower() in self._hosts

    def is_own_origin(self, origin: str | None) -> bool:
        """Whether a request's Origin header is this page's; programs send none."""
        return origin is None or origin.partition("://")[2].lower() in self._hosts

    def log_in(self, secret: str, now_s: float) -> tuple[str, Session] | None:
        """A new session and the value of its cookie; None where the secret is wrong. Raises `TooManyWrong`."""
        role = self._role(secret, now_s)
        if role is Role.NOBODY:
            return None
        cookie = secrets.token_urlsafe(24)
        self._sessions[cookie] = session = Session(role, secrets.token_urlsafe(18), now_s + SESSION_S)
        while len(self._sessions) > MOST_SESSIONS:
            self._sessions.popitem(last=False)
        return cookie, session

    def session(self, cookie: str | None, now_s: float) -> Session | None:
        """The session of a cookie, if it is still one."""
        found = self._sessions.get(cookie or "")
        return found if found is not None and now_s < found.until_s else None

    def role(self, cookie: str | None, bearer: str | None, now_s: float) -> Role:
        """What the sender of a request may do that changes nothing. Raises `TooManyWrong`."""
        if bearer is not None:
            return self._role(bearer, now_s)
        found = self.session(cookie, now_s)
        return found.role if found is not None else Role.NOBODY

    def may_change(self, cookie: str | None, bearer: str | None, csrf: str | None, now_s: float) -> bool:
        """Whether the sender of a request may change something. Raises `TooManyWrong`."""
        if bearer is not None:
            return self._role(bearer, now_s) is Role.OPERATOR
        found = self.session(cookie, now_s)
        if found is None or found.role is not Role.OPERATOR or csrf is None:
            return False
        return hmac.compare_digest(found.csrf.encode(), csrf.encode())

    def _role(self, secret: str, now_s: float) -> Role:
        self._wrong_s = [time_s for time_s in self._wrong_s if now_s - time_s < 60.0]
        if len(self._wrong_s) >= WRONG_IN_A_MINUTE:
            raise TooManyWrong
        given = secret.encode()
        # Both are compared in any case, so that the time tells nothing.
        reads = hmac.compare_digest(given, self._keys.read.encode())
        controls = hmac.compare_digest(given, self._keys.control.encode())
        if controls:
            return Role.OPERATOR
        if reads:
            return Role.READER
        self._wrong_s.append(now_s)
        return Role.NOBODY
