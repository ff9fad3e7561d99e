"""`Session` without a network: its words are caught, the coordinator's are put in by hand."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
from helpers.fake_coordinator import config

from coordinator.client import Session
from coordinator.messages import (
    Commit,
    CoordinatorMessage,
    Evicted,
    Failed,
    Go,
    Heartbeat,
    Join,
    Leave,
    NodeMessage,
    Pause,
    Ready,
    Refused,
    Roster,
    RosterEntry,
    Round,
    Saved,
    Stop,
    Vote,
    Welcome,
    decode_from_node,
    encode,
)
from netem.errors import ConfigError, GenerationOver, IsthmusError, ProtocolError, RunAborted
from netem.keys import Access, new_pair

ACCESS = Access(new_pair(), encrypts=False)
WELCOME = Welcome(rank=-1, heartbeat_interval_s=1.0, heartbeat_timeout_s=10.0)
ROSTER = Roster(
    generation=1,
    members=[RosterEntry(name="node-0", peer="node-0~7", rank=0, address="tcp://127.0.0.1:1")],
    assignment=[[0, 1]],
)
LATER = Roster(generation=3, start_step=1, members=ROSTER.members, assignment=[[0, 1]])
GO = Go(step=0, generation=1, cursor=0, rounds=[Round(round_id=0, kind="weights", weights=[1.0])])


def changed(roster: Roster, **changes: Any) -> Roster:
    return msgspec.structs.replace(roster, **changes)


Answers = dict[type, list[CoordinatorMessage]]


class Script:
    """A coordinator by the book: to each kind of message, on another thread, the answers it is given."""

    def __init__(self, answers: Answers, **changes: Any) -> None:
        self.said: list[NodeMessage] = []
        self.answers = dict(answers)
        self.session = Session(
            config(**changes),
            self._hear,
            run="r",
            name="node-0",
            address="tcp://127.0.0.1:1",
            config_digest="cfg",
            access=ACCESS,
        )

    def _hear(self, body: bytes) -> None:
        message = decode_from_node(body)
        if not isinstance(message, Heartbeat):
            self.said.append(message)
        answers = self.answers.get(type(message), [])
        if answers:
            threading.Thread(target=self.tell, args=answers).start()

    def tell(self, *messages: CoordinatorMessage) -> None:
        for message in messages:
            self.session.on_message(encode(message))


@pytest.fixture
def script() -> Iterator[Callable[..., Script]]:
    made: list[Script] = []

    def make(answers: Answers, **changes: Any) -> Script:
        made.append(Script(answers, **changes))
        return made[-1]

    yield make
    for one in made:
        one.session.leave()
    names = [thread.name for thread in threading.enumerate()]
    assert "node-0-heartbeat" not in names


MakeScript = Callable[[Answers], Script]
BY_THE_BOOK: Answers = {
    Join: [WELCOME, ROSTER],
    Ready: [GO],
    Vote: [Commit(round_id=0)],
}


def test_a_step_by_the_book(script: MakeScript) -> None:
    one = script(BY_THE_BOOK)
    assert one.session.join() == (0, ROSTER)
    assert one.session.ready(0, {"tokens": 1.0}, {"basis": "ab"}) == GO
    assert one.session.vote(0, True, "digest") == Commit(round_id=0)
    one.session.saved(1)
    one.answers[Ready] = [Stop(ok=True)]
    assert one.session.ready(1) == Stop(ok=True)
    assert one.session.abort_reason is None
    one.session.leave()
    assert [type(message) for message in one.said] == [Join, Ready, Vote, Saved, Ready, Leave]
    assert one.said[1] == Ready(step=0, generation=1, metrics={"tokens": 1.0}, digests={"basis": "ab"})
    join = one.said[0]
    assert isinstance(join, Join)
    assert (join.key, join.encrypted) == (ACCESS.pair.public, False)
    assert join.pid > 0


def test_a_node_without_data_joins_first_and_asks_again_when_it_has_them(script: MakeScript) -> None:
    one = script({Join: [WELCOME]})
    asked = []

    def has_data() -> bool:
        asked.append(len(one.said))
        one.answers[Join] = [WELCOME, ROSTER]
        return len(asked) == 3

    one.session.enter(has_data)
    assert next(one.session.rosters()) == (0, ROSTER)
    assert [message.preparing for message in one.said if isinstance(message, Join)] == [True, False]
    assert asked == [1, 1, 1], "it has been let in before"


def test_a_run_that_ends_while_a_node_has_no_data_ends_there_too(script: MakeScript) -> None:
    one = script({Join: [WELCOME, Stop(ok=False, reason="a full disk")]})
    with pytest.raises(RunAborted, match="a full disk"):
        one.session.enter(lambda: False)


def test_rosters_come_one_after_another_until_the_run_is_over(script: MakeScript) -> None:
    one = script(BY_THE_BOOK)
    announced: list[int] = []
    one.session.on_generation(announced.append)
    rosters = one.session.rosters()
    assert next(rosters) == (0, ROSTER)
    one.session.ready(0)
    one.answers[Vote] = [LATER]
    with pytest.raises(GenerationOver, match="generation 1 is over"):
        one.session.vote(0, True)
    said = list(one.said)
    for call in (lambda: one.session.ready(1), lambda: one.session.vote(0, True)):
        with pytest.raises(GenerationOver):
            call()
    assert one.said == said, "words of the old generation would be taken for the new one's"
    assert next(rosters) == (0, LATER)
    assert announced == [1, 3]
    one.answers[Ready] = [Go(step=1, generation=3, cursor=4)]
    assert one.session.ready(1) == Go(step=1, generation=3, cursor=4)
    one.answers[Ready] = [changed(LATER, generation=4)]
    with pytest.raises(GenerationOver):
        one.session.ready(2)
    one.tell(changed(LATER, generation=5))
    assert next(rosters)[1].generation == 5  # the newest alone
    one.answers[Ready] = [Stop(ok=True)]
    assert one.session.ready(1) == Stop(ok=True)
    assert list(rosters) == []


def test_no_roster_follows_an_abort(script: MakeScript) -> None:
    one = script(BY_THE_BOOK)
    rosters = one.session.rosters()
    next(rosters)
    one.tell(Stop(ok=False, reason="node-2 was lost"))
    with pytest.raises(RunAborted, match="node-2 was lost"):
        next(rosters)


def test_the_next_roster_is_waited_for(script: MakeScript) -> None:
    one = script(BY_THE_BOOK)
    rosters = one.session.rosters()
    next(rosters)
    one.tell(Pause(generation=3, reason="too few"))
    with pytest.raises(GenerationOver, match="generation 1 is over"):
        one.session.ready(0)
    threading.Timer(0.05, one.tell, [changed(LATER, generation=4)]).start()
    assert next(rosters)[1].generation == 4


def test_a_commit_counts_though_the_generation_ends_right_after_it(script: MakeScript) -> None:
    one = script(BY_THE_BOOK | {Vote: [Commit(round_id=0), LATER]})
    rosters = one.session.rosters()
    next(rosters)
    one.session.ready(0)
    assert one.session.vote(0, True) == Commit(round_id=0)
    with pytest.raises(GenerationOver):
        one.session.ready(1)


def test_who_is_evicted_says_so_and_joins_anew(script: MakeScript, caplog: pytest.LogCaptureFixture) -> None:
    one = script(BY_THE_BOOK)
    rosters = one.session.rosters()
    next(rosters)
    announced: list[int] = []
    one.session.on_generation(announced.append)
    one.tell(Evicted(reason="node-0 was lost: silent for 10 s"))
    assert announced == [2], "every wait in the old generation ends"
    with pytest.raises(GenerationOver):
        one.session.ready(0)
    one.answers[Join] = [WELCOME, LATER]
    with caplog.at_level(logging.WARNING):
        assert next(rosters) == (0, LATER)
    assert "the others go on without this node: node-0 was lost: silent for 10 s" in caplog.text
    assert [type(message) for message in one.said] == [Join, Join]


def test_a_node_whose_name_is_about_to_be_free_asks_again(script: MakeScript) -> None:
    one = script({Join: [Refused(reason="a node named node-0 is already here", again_s=0.1)]})
    threading.Timer(0.05, one.answers.update, [{Join: [WELCOME, ROSTER]}]).start()
    aborts: list[str] = []
    one.session.on_abort(aborts.append)
    assert one.session.join() == (0, ROSTER)
    assert aborts == [], "what waits for messages was told that the run is over"
    assert [type(message) for message in one.said] == [Join, Join]


def test_a_refusal_is_a_config_error_with_its_reason(script: MakeScript) -> None:
    one = script({Join: [Refused(reason="rank 1 is taken by node-1")]})
    with pytest.raises(ConfigError, match="refuses this node: rank 1 is taken"):
        one.session.join()
    one.session.leave()
    assert [type(message) for message in one.said] == [Join]


def test_nobody_there_is_a_config_error_within_the_deadline() -> None:
    one = Script({}, join_timeout_s=0.05, heartbeat_interval_s=0.02)
    with pytest.raises(ConfigError, match=r"no answer from the coordinator within 0\.05 s; is it running"):
        one.session.join()


def test_an_abort_raises_with_its_reason_and_tells_the_subscribers_once(script: MakeScript) -> None:
    one = script(BY_THE_BOOK | {Vote: [Stop(ok=False, reason="node-1 failed")]})
    reasons: list[str] = []
    one.session.on_abort(reasons.append)
    one.session.join()
    one.session.ready(0)
    with pytest.raises(RunAborted, match="node-1 failed"):
        one.session.vote(0, True)
    for call in (lambda: one.session.ready(1), lambda: one.session.vote(0, True)):
        with pytest.raises(RunAborted, match="node-1 failed"):
            call()
    assert reasons == ["node-1 failed"]
    one.session.on_abort(reasons.append)
    assert reasons == ["node-1 failed"] * 2


def test_a_stop_while_the_trainer_computes_is_seen_by_subscribers_at_once(script: MakeScript) -> None:
    one = script(BY_THE_BOOK)
    one.session.join()
    one.session.ready(0)
    reasons: list[str] = []
    one.session.on_abort(reasons.append)
    one.tell(Stop(ok=False, reason="node-2 was lost"))
    assert reasons == ["node-2 was lost"]
    with pytest.raises(RunAborted, match="node-2 was lost"):
        one.session.raise_if_over()
    one.session.fail("gives up too")
    assert one.said[-1] == Failed(reason="gives up too")


def test_nonsense_from_the_coordinator_ends_the_run_without_raising_on_the_io_thread(script: MakeScript) -> None:
    one = script(BY_THE_BOOK)
    one.session.join()
    one.session.on_message(b"\xc1")
    with pytest.raises(RunAborted, match="coordinator: a control message that is not MessagePack"):
        one.session.ready(0)


def test_a_message_out_of_turn_ends_the_run(script: MakeScript) -> None:
    one = script(BY_THE_BOOK)
    one.session.join()
    one.tell(GO)
    with pytest.raises(RunAborted, match="coordinator: Go while this node is computing"):
        one.session.ready(0)


def test_a_broken_transport_ends_every_wait(script: MakeScript) -> None:
    one = script({Join: [WELCOME, ROSTER]})
    one.session.join()
    threading.Timer(0.02, one.session.on_failure, [IsthmusError("the I/O thread broke")]).start()
    with pytest.raises(RunAborted, match="the I/O thread broke"):
        one.session.ready(0)


def test_a_silent_coordinator_ends_every_wait() -> None:
    one = Script({Join: [WELCOME, ROSTER]}, heartbeat_interval_s=0.02, heartbeat_timeout_s=0.1, return_timeout_s=0)
    one.answers[Join] = [Welcome(rank=-1, heartbeat_interval_s=0.02, heartbeat_timeout_s=0.1), ROSTER]
    one.session.join()
    with pytest.raises(RunAborted, match=r"the coordinator was lost: silent for 0\.1 s"):
        one.session.ready(0)
    one.session.leave()


def test_a_coordinator_that_lives_and_never_answers_has_a_limit_too(script: Callable[..., Script]) -> None:
    one = script(
        {Join: [WELCOME, ROSTER]},
        progress_timeout_s=0.02,
        heartbeat_timeout_s=0.03,
        heartbeat_interval_s=0.01,
        step_timeout_s=0.01,
    )
    one.session.join()
    with pytest.raises(RunAborted, match=r"lives, but gave no answer within 0\.06 s"):
        one.session.ready(0)


def test_a_wire_that_refuses_ends_the_run() -> None:
    def broken(body: bytes) -> None:
        raise IsthmusError("the endpoint is closed")

    session = Session(config(), broken, run="r", name="n", address="a", config_digest="c")
    with pytest.raises(RunAborted, match="the endpoint is closed"):
        session.join()
    session.leave()


def test_a_trainers_mistake_is_its_own(script: MakeScript) -> None:
    one = script(BY_THE_BOOK)
    one.session.join()
    with pytest.raises(ProtocolError, match="open is no round"):
        one.session.vote(3, True)
