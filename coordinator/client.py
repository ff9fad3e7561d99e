"""A node's conversation with the coordinator, for the trainer's thread: blocking calls with deadlines.

`Session` wraps the machine `Member` with a lock, a clock and a timer thread. It owns no endpoint: it is given a
`send`, and the node's receiver hands it the coordinator's messages (`on_message`, on the I/O thread), so a node has one
endpoint for control and bulk. The timer thread sends heartbeats while the trainer computes.

A node that was evicted joins anew and comes in with a later generation (`Session.rosters`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping

from coordinator.config import CoordinatorConfig
from coordinator.introduction import introduce, without_data
from coordinator.layout import PLAIN, SitePlace
from coordinator.member import End, Member, State
from coordinator.messages import (
    CONTROL_TAG,
    COORDINATOR,
    Alter,
    Changed,
    Commit,
    Failed,
    Go,
    Join,
    Leave,
    NodeMessage,
    Pause,
    Ready,
    Refused,
    Roster,
    Saved,
    Send,
    Stop,
    Suspect,
    Vote,
    decode_from_coordinator,
    encode,
    shorten,
)
from netem.endpoint import Endpoint
from netem.errors import ConfigError, GenerationOver, IsthmusError, NotAdmitted, ProtocolError, RunAborted
from netem.keys import Access
from netem.schedule import Timed

log = logging.getLogger("isthmus.node")

MOST_EVICTIONS = 20
"""A node that was evicted so often gives up."""

OnNetwork = Callable[[float, tuple[Timed, ...]], None]
"""Called with the monotonic time at which the run began here, and all changes of its network by command."""

_NO_KEY = """it does not accept this node's key; give ISTHMUS_TOKEN as the coordinator has it, \
or in coordinator.keys an invitation to this run"""


def sender(endpoint: Endpoint) -> Send:
    """A `send` for a session, over a node's endpoint that is connected to the peer `COORDINATOR`."""
    return lambda body: endpoint.send(COORDINATOR, CONTROL_TAG, [body], urgent=True)


class Session:
    """One node in one run. The blocking calls belong to one thread, the trainer's.

    Every blocking call raises `RunAborted` with the reason once the run has ended before its last step, and
    `GenerationOver` once the generation that `rosters` has given last is over.

    `run` is the run's name, `name` the node's plain name, `address` the address at which its endpoint listens, `access`
    that of its endpoint, and `memory_bytes` its device's memory, 0 for unknown; `rank` is the rank that it asks for, −1
    for none, and `place` this process's place in its site. `on_network` is called on the I/O thread when a roster
    comes, and when the network is changed.
    """

    def __init__(
        self,
        config: CoordinatorConfig,
        send: Send,
        *,
        run: str,
        name: str,
        address: str,
        config_digest: str,
        access: Access | None = None,
        memory_bytes: float = 0.0,
        rank: int = -1,
        on_network: OnNetwork | None = None,
        place: SitePlace = PLAIN,
    ) -> None:
        self._config = config
        self._on_network = on_network
        self._wire = send
        self._join = introduce(run, name, address, config_digest, access, memory_bytes, rank, place)
        self._member = Member(config)
        self._changed = threading.Condition()
        self._generation = 0  # of the roster that the trainer's thread knows
        self._ask_again_s = 0.0  # after a refusal
        # The coordinator finds who holds a step up, and ends the run itself where nobody makes progress.
        self._patience_s = config.progress_timeout_s + config.step_timeout_s + config.heartbeat_timeout_s
        self._callbacks: list[Callable[[str], None]] = []
        self._on_generation: list[Callable[[int], None]] = []
        self._closed = threading.Event()
        self._timer = threading.Thread(target=self._keep_time, name=f"{name}-heartbeat", daemon=True)

    def rosters(self) -> Iterator[tuple[int, Roster]]:
        """Join, then give this node's rank and the roster of each generation, one after another.

        Ask for the next one when a call has raised `GenerationOver`, or when the run has ended in good order: then
        there is none. It waits where none has begun yet, and joins anew where this node was evicted. Raises as `join`
        does.
        """
        yield self.join()
        evictions = 0
        while (how := self._how_it_ended()) is None or how is End.EVICTED:
            if how is None:
                self._await_generation()
                if self._how_it_ended() is None:
                    yield self._newest()
                continue
            evictions += 1
            assert self._member.ending is not None
            log.warning("the others go on without this node: %s; joining anew", self._member.ending.reason)
            if evictions > MOST_EVICTIONS:
                raise RunAborted(f"this node was told to go {evictions} times: {self._member.ending.reason}")
            yield self.join()
        self.raise_if_over()

    def join(self) -> tuple[int, Roster]:
        """Ask to be let in, and wait until all nodes have joined, or, in a run that goes on, until the next generation
        begins. Returns this node's rank and the roster.

        Raises `ConfigError` where the coordinator refuses or cannot be reached.
        """
        # The coordinator ends a rendezvous by itself. This limit is for one that is alive and sends no roster.
        limit_s = 2 * self._config.join_timeout_s + self._config.heartbeat_timeout_s + self._config.progress_timeout_s
        if self._member.state in (State.NEW, State.DONE):
            self._ask_to_join(self._join, limit_s)
        self._wait_while((State.WAITING,), limit_s)
        self._check_let_in()
        return self._newest()

    def enter(self, has_data: Callable[[], bool]) -> None:
        """Join before this node has its data. `has_data` is called until it says so; `join` follows. Raises as that."""
        self._ask_to_join(without_data(self._join), self._config.join_timeout_s)
        self._check_let_in()
        while not has_data():
            self._check_let_in()
        self._say(self._join)

    def _check_let_in(self) -> None:
        if (ending := self._member.ending) is not None:
            if ending.how is End.REFUSED:
                raise ConfigError(f"the coordinator refuses this node: {ending.reason}")
            if ending.how is End.UNREACHABLE:
                raise ConfigError(f"{ending.reason}; is it running, and is its address right?")
            raise RunAborted(ending.reason)

    def ready(
        self, step: int, metrics: Mapping[str, float] | None = None, digests: Mapping[str, str] | None = None
    ) -> Go | Stop:
        """Say that `step` steps are done, and wait for the next step, or for the end of the run in good order."""
        self._say(Ready(step=step, metrics=dict(metrics or {}), digests=dict(digests or {})))
        self._wait_while((State.READY,), self._patience_s)
        if self._member.ending is not None and self._member.ending.how is End.FINISHED:
            return Stop(ok=True, reason=self._member.ending.reason)
        with self._changed:
            self._raise_if_void()
            assert self._member.go is not None
            return self._member.go

    def vote(self, round_id: int, ok: bool, digest: str = "", reason: str = "") -> Commit:
        """Say how the round went here, and wait for the decision. Where this returns, the round has happened on all
        members, though the generation or the run may be over by then; where it raises, on none."""
        self._say(Vote(round_id=round_id, ok=ok, digest=digest, reason=shorten(reason)))
        self._wait_while((State.VOTED,), self._patience_s)
        with self._changed:
            if self._member.committed != round_id:
                self._raise_if_void()
        return Commit(round_id=round_id)

    def suspect(self, peer: str, reason: str) -> None:
        """Report a member that this node waits for in vain, cannot reach, or has got nonsense from. Does not wait, and
        may be called from any thread."""
        with self._changed:
            out = self._member.send(Suspect(peer=peer, reason=shorten(reason)), time.monotonic())
        self._put(out)

    def leave(self, reason: str = "") -> None:
        """Leave the run; the others go on without this node. Does not raise, and may be called twice."""
        self._part(Leave(reason=shorten(reason)))

    def fail(self, reason: str, ends_run: bool = False) -> None:
        """Tell the coordinator that this node cannot go on, or, with `ends_run`, that nobody should. Does not raise,
        and may be called twice."""
        self._part(Failed(reason=shorten(reason), ends_run=ends_run))

    def raise_if_over(self) -> None:
        """Raise `RunAborted` where the run has ended before its last step."""
        if (reason := self.abort_reason) is not None:
            raise RunAborted(reason)

    @property
    def abort_reason(self) -> str | None:
        """Why the run ended before its last step; None where it has not. May be read from any thread."""
        ending = self._member.ending
        goes_on = ending is None or ending.how in (End.FINISHED, End.EVICTED) or self._ask_again_s > 0
        return None if goes_on or ending is None else ending.reason

    def saved(self, step: int, reason: str = "", generation: int | None = None) -> None:
        """Say that this node's part of the checkpoint after `step` steps is on disk, or why it is not.

        It neither waits nor raises: where this node has left the run, or its `generation` is over, in which the part
        was made, nobody needs to know.
        """
        with self._changed:
            roster = self._member.roster
            if generation is not None and (roster is None or roster.generation != generation):
                return
            try:
                out = self._member.send(Saved(step=step, reason=shorten(reason)), time.monotonic())
            except ProtocolError:
                return
        self._put(out)

    def on_abort(self, callback: Callable[[str], None]) -> None:
        """Have `callback(reason)` called once when the run is aborted, or at once where it is already.

        It is called on the thread that learns of it (I/O, timer or trainer) and must not block.
        """
        with self._changed:
            reason = self.abort_reason
            if reason is None:
                self._callbacks.append(callback)
        if reason is not None:
            callback(reason)

    def on_generation(self, callback: Callable[[int], None]) -> None:
        """Have `callback(generation)` called whenever a generation is over: when a later roster or a pause comes, or
        this node is evicted; also when the first begins. It is called on the I/O thread and must not block."""
        self._on_generation.append(callback)

    def on_message(self, body: bytes | bytearray | memoryview) -> None:
        """Take in a control message. One that breaks the protocol ends the run here; this does not raise."""
        try:
            message = decode_from_coordinator(body)
            with self._changed:
                self._member.receive(message, time.monotonic())
                if isinstance(message, Refused) and self._member.state is State.GONE:
                    self._ask_again_s = message.again_s
            if isinstance(message, Roster | Pause):
                self._announce(message.generation)
            elif self._how_it_ended() is End.EVICTED:
                self._announce(self._generation + 1)
            if isinstance(message, Roster | Alter):
                self._follow(message)
        except ProtocolError as error:
            with self._changed:
                self._member.lose(str(error))
        self._settle()

    def on_failure(self, error: IsthmusError) -> None:
        """The node's endpoint or its link to the coordinator failed: the run is over here."""
        with self._changed:
            if isinstance(error, NotAdmitted) and self._member.state is State.JOINING:
                self._member.receive(Refused(reason=_NO_KEY), time.monotonic())
            else:
                self._member.lose(str(error))
        self._settle()

    def _say(self, message: NodeMessage) -> None:
        with self._changed:
            self._raise_if_void()
            out = self._member.send(message, time.monotonic())
        self._put(out)

    def _ask_to_join(self, join: Join, limit_s: float) -> None:
        """Ask until the coordinator has answered; again where a process of this name is about to be found lost."""
        while True:
            with self._changed:
                self.raise_if_over()
                out = self._member.send(join, time.monotonic())
                self._ask_again_s = 0.0
            self._put(out)
            if not self._timer.is_alive():
                self._timer.start()
            self._wait_while((State.JOINING,), limit_s)
            if (pause_s := self._ask_again_s) <= 0:
                return
            self._pause(pause_s)

    def _pause(self, seconds: float) -> None:
        """Wait, unless this node leaves meanwhile. The member then starts over."""
        log.info("the coordinator still counts on an earlier process of this name; asking again in %.0f s", seconds)
        self._closed.wait(seconds)
        with self._changed:
            self._member = Member(self._config)

    def _await_generation(self) -> None:
        """Wait until a generation has begun that the trainer's thread does not know, or the run is over here."""
        with self._changed:
            known = self._generation

            def has_come() -> bool:
                member = self._member
                return member.ending is not None or (member.state is not State.WAITING and member.generation > known)

            if not self._changed.wait_for(has_come, self._patience_s):
                self._member.lose(f"the coordinator lives, but began no generation within {self._patience_s:g} s")
        self._settle()

    def _how_it_ended(self) -> End | None:
        ending = self._member.ending
        return None if ending is None else ending.how

    def _announce(self, generation: int) -> None:
        for callback in self._on_generation:
            callback(generation)

    def _newest(self) -> tuple[int, Roster]:
        """This node's rank and the roster of the newest generation, which the trainer's thread knows from here on."""
        with self._changed:
            roster = self._member.roster
            assert roster is not None
            self._generation = roster.generation
            return self._member.rank, roster

    def _raise_if_void(self) -> None:
        """Raise where the run is over, or the trainer's thread works in a generation that is."""
        self.raise_if_over()
        if self._how_it_ended() is End.EVICTED or self._member.generation > self._generation:
            raise GenerationOver(f"generation {self._generation} is over")

    def _follow(self, message: Roster | Alter) -> None:
        """Hand the network's changes on, and confirm a new one to the coordinator."""
        member = self._member
        if self._on_network:
            self._on_network(member.began_s, member.changes)
        if isinstance(message, Alter):
            with self._changed:
                out = member.send(Changed(number=message.number), time.monotonic())
            self._put(out)

    def _part(self, message: Leave | Failed) -> None:
        with self._changed:
            out = self._member.send(message, time.monotonic())
        self._closed.set()
        self._put(out)
        self._settle()
        if self._timer.is_alive() and self._timer is not threading.current_thread():
            self._timer.join(timeout=5.0)

    def _put(self, messages: list[NodeMessage]) -> None:
        """Send, without the lock, for which the I/O thread may be waiting."""
        try:
            for message in messages:
                self._wire(encode(message))
        except IsthmusError as error:
            self.on_failure(error)

    def _wait_while(self, states: tuple[State, ...], limit_s: float) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: self._member.state not in states, limit_s):
                self._member.lose(f"the coordinator lives, but gave no answer within {limit_s:g} s")
        self._settle()

    def _settle(self) -> None:
        """Wake the waiting calls. Where the run has been aborted, call the callbacks, once."""
        with self._changed:
            self._changed.notify_all()
            reason = self.abort_reason
            callbacks, self._callbacks = (self._callbacks, []) if reason is not None else ([], self._callbacks)
        for callback in callbacks:
            assert reason is not None
            callback(reason)

    def _keep_time(self) -> None:
        """The timer thread: it sends heartbeats, and ends the run where the coordinator is silent."""
        pause_s = min(0.25, self._config.heartbeat_interval_s / 2)
        while not self._closed.wait(pause_s):
            with self._changed:
                beats = self._member.tick(time.monotonic())
                again = self._ask_again_s > 0 or self._how_it_ended() is End.EVICTED
                over = self._member.ending is not None and not again
            self._put(beats)
            if over or again:
                self._settle()
            if over:
                return
