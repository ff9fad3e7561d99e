"""Who may see a page and change a network through it."""

import pytest

from node.watch.page.access import (
    MOST_SESSIONS,
    SESSION_S,
    WRONG_IN_A_MINUTE,
    Access,
    Keys,
    Role,
    TooManyWrong,
    new_keys,
)

KEYS = Keys("read-secret", "control-secret")


@pytest.fixture
def access() -> Access:
    return Access(KEYS, ["127.0.0.1:7080", "localhost:7080"])


def test_each_secret_gives_its_role(access: Access) -> None:
    for secret, role in ((KEYS.read, Role.READER), (KEYS.control, Role.OPERATOR)):
        found = access.log_in(secret, 0.0)
        assert found is not None
        cookie, session = found
        assert session.role is role
        assert access.role(cookie, None, 1.0) is role
        assert access.role(None, secret, 1.0) is role
    assert access.log_in("guess", 0.0) is None
    assert access.role("guess", None, 0.0) is Role.NOBODY
    assert access.role(None, None, 0.0) is Role.NOBODY


def test_two_pages_have_different_secrets() -> None:
    one, other = new_keys(), new_keys()
    assert len({one.read, one.control, other.read, other.control}) == 4
    assert len(one.read) >= 24


def test_a_change_needs_the_operators_session_and_its_token(access: Access) -> None:
    reader, operator = access.log_in(KEYS.read, 0.0), access.log_in(KEYS.control, 0.0)
    assert reader is not None
    assert operator is not None
    assert access.may_change(operator[0], None, operator[1].csrf, 1.0)
    assert not access.may_change(operator[0], None, None, 1.0)
    assert not access.may_change(operator[0], None, reader[1].csrf, 1.0)
    assert not access.may_change(reader[0], None, reader[1].csrf, 1.0)
    assert not access.may_change(None, None, operator[1].csrf, 1.0)
    assert access.may_change(None, KEYS.control, None, 1.0)
    assert not access.may_change(None, KEYS.read, None, 1.0)


def test_a_session_ends(access: Access) -> None:
    found = access.log_in(KEYS.read, 0.0)
    assert found is not None
    assert access.role(found[0], None, SESSION_S - 1) is Role.READER
    assert access.role(found[0], None, SESSION_S) is Role.NOBODY


def test_sessions_are_bounded(access: Access) -> None:
    first = access.log_in(KEYS.read, 0.0)
    assert first is not None
    for _ in range(MOST_SESSIONS):
        access.log_in(KEYS.read, 0.0)
    assert access.role(first[0], None, 0.0) is Role.NOBODY


def test_guessing_is_slowed_down(access: Access) -> None:
    for _ in range(WRONG_IN_A_MINUTE):
        assert access.log_in("guess", 0.0) is None
    with pytest.raises(TooManyWrong):
        access.log_in(KEYS.control, 30.0)
    assert access.log_in(KEYS.control, 61.0) is not None


def test_hosts_and_origins(access: Access) -> None:
    assert access.knows_host("LOCALHOST:7080")
    assert not access.knows_host("localhost")
    assert not access.knows_host("evil.example:7080")
    assert access.is_own_origin(None)
    assert access.is_own_origin("http://127.0.0.1:7080")
    assert not access.is_own_origin("http://evil.example")
    assert not access.is_own_origin("null")
