"""The inbox beside the conversation with the coordinator: whose word ends a wait, and who hears what is wrong."""

from __future__ import annotations

import pytest
from helpers.inboxes import FORMAT, RING_CAP_BYTES, Talk, make_inbox, size, tag

from coordinator.messages import CONTROL_TAG, COORDINATOR, MAX_BODY_BYTES
from netem.errors import IsthmusError, PeerLate, PeerSilent, ProtocolError, RunAborted
from node.exchange.inbox import Inbox
from node.exchange.keys import RingKey
from node.exchange.tags import encode_tag


def test_control_goes_to_the_conversation() -> None:
    inbox, talk = Inbox(FORMAT, RING_CAP_BYTES), Talk()
    inbox.follow(talk)
    room = inbox.admit(COORDINATOR, 1, CONTROL_TAG, 5)
    assert room is not None
    room[:] = b"hello"
    inbox.deliver(COORDINATOR, 1, CONTROL_TAG, room)
    assert talk.heard == [b"hello"]
    with pytest.raises(ProtocolError, match="control message"):
        inbox.admit(COORDINATOR, 1, CONTROL_TAG, MAX_BODY_BYTES + 1)
    assert inbox.admit(COORDINATOR, 1, encode_tag(tag()), size(tag())) is None


def test_the_coordinators_word_and_the_endpoints_failure_end_all_waits() -> None:
    inbox, talk = make_inbox(), Talk()
    inbox.follow(talk)
    talk.abort("node-3 is lost")
    with pytest.raises(RunAborted, match="node-3 is lost"):
        inbox.take(RingKey(0, 0, 0), 60)
    inbox, talk = make_inbox(), Talk()
    inbox.follow(talk)
    failure = IsthmusError("the I/O thread broke")
    inbox.failed(failure)
    assert talk.failures == [failure]
    with pytest.raises(IsthmusError, match="the I/O thread broke"):
        inbox.take(RingKey(0, 0, 0), 60)


@pytest.mark.parametrize("error", [ProtocolError("nonsense", peer="ann"), PeerSilent("ann", 30.0)])
def test_what_is_wrong_with_a_member_is_told_to_the_coordinator_which_decides(error: IsthmusError) -> None:
    inbox, talk = make_inbox(), Talk()
    inbox.follow(talk)
    inbox.failed(error)
    assert talk.suspected == [("ann", str(error))]
    assert talk.failures == []
    with pytest.raises(PeerLate):  # the wait goes on
        inbox.take(RingKey(0, 0, 0), 0)


def test_a_coordinator_that_is_silent_may_come_back(caplog: pytest.LogCaptureFixture) -> None:
    """How long this node waits for it is for the conversation to say."""
    inbox = make_inbox()
    inbox.failed(PeerSilent(COORDINATOR, 30.0))
    inbox.raise_if_over()
    assert "coordinator has not answered for 30 s" in caplog.text
    assert "waiting for it to come back" in caplog.text
    inbox.failed(ProtocolError("nonsense", peer=COORDINATOR))
    with pytest.raises(ProtocolError):
        inbox.raise_if_over()
