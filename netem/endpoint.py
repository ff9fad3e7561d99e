"""The endpoint: what the upper floors use of the network, from any thread, and its one I/O thread.

`netem.engine` is what the I/O thread runs. Other threads put commands into a queue, and wait only in calls with a time
limit (`send`, `flush`, `close`).
"""

from __future__ import annotations

import copy
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from netem.assembly import Receiver
from netem.counters import LinkCounters
from netem.door import DoorCounters, DoorLimits
from netem.engine import Engine
from netem.errors import ConfigError, IsthmusError, QueueFull
from netem.keys import Access
from netem.limits import MAX_NAME_BYTES, Limits
from netem.names import SEPARATOR, certified, plain
from netem.network import Profile
from netem.peers import STRANGERS
from netem.schedule import Schedule
from netem.segments import Message
from netem.sockets import Sockets, parse_address

if TYPE_CHECKING:
    from typing_extensions import Buffer

_DEFAULT_LIMITS = Limits()
_DEFAULT_DOOR = DoorLimits()
_LINGER_S = 0.2

_clock = time.monotonic


def unique(name: str, public_key: str = "") -> str:
    """An endpoint's name that no other process has, and that cannot be guessed (`netem.names`).

    With a public key, only the owner of that key can use the name.
    """
    if public_key:
        return certified(name, secrets.token_hex(4), public_key)
    return f"{name}{SEPARATOR}{secrets.token_hex(8)}"


class Endpoint:
    """One node's connection to the emulated network. `profile` shapes what it sends to each peer.

    Raises `ConfigError` if `bind` is not "tcp://INTERFACE:PORT", or cannot be bound. With `bind=None` no peer can dial
    this endpoint; peers answer over the connections that it opened. `address` is the bound address with the resolved
    port, or empty. Two processes on one network must not have the same `name`: see `unique`. Without `access`, whoever
    reaches the address may call, and nothing is encrypted; with it, `name` must be `unique(…, access.pair.public)`.
    """

    def __init__(
        self,
        name: str,
        run_id: str,
        profile: Profile,
        receiver: Receiver,
        *,
        bind: str | None,
        limits: Limits = _DEFAULT_LIMITS,
        access: Access | None = None,
        door: DoorLimits = _DEFAULT_DOOR,
    ) -> None:
        _check_name(name, "name", MAX_NAME_BYTES)
        _check_name(run_id, "run_id", 64)
        self.name = name
        self._receiver = receiver
        self._limits = limits
        self._sockets = Sockets(name, bind, limits, access, door)
        self.address = self._sockets.address
        self._engine = Engine(name, run_id, profile, receiver, self._sockets, limits, self._settle)
        # These are shared with the callers' threads.
        self._commands: deque[Callable[[], None]] = deque()
        self._awake = False
        self._settled = threading.Condition()
        self._queued_bytes = 0
        self._queued_messages = 0
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name=f"netem {name}", daemon=True)
        self._thread.start()

    # ── Called by any thread ─────────────────────────────────────────────────────────────────────────────────────

    def connect(
        self, peer: str, address: str, *, answers_only: bool = False, key: str = "", encrypted: bool = True
    ) -> None:
        """Dial `peer` at "tcp://HOST:PORT"; it need not listen yet. A later call with another address replaces this.

        With `answers_only`, the peer is heard over this connection alone: a caller with its name is a stranger.
        Between endpoints with `access`, `key` is the peer's public key, and `encrypted` its `Access.encrypts`.
        """
        parse_address(address, f"address of {plain(peer)}", dial=True)
        _check_name(peer, "peer", MAX_NAME_BYTES)
        self._submit(lambda: self._engine.connect(peer, address, answers_only, key, encrypted))

    def share(self, secret: str) -> None:
        """Take the secret that the members share. Peers that do not encrypt can be dialled only after that."""
        self._submit(lambda: self._sockets.share(secret))

    def trust(self, peer: str) -> None:
        """The peer, which has called this endpoint, is no stranger from now on."""
        self._submit(lambda: self._engine.trust(peer))

    def send(
        self,
        peer: str,
        tag: bytes,
        buffers: Sequence[Buffer] = (),
        *,
        urgent: bool = False,
        flow: int = 0,
        timeout_s: float = 0.0,
    ) -> None:
        """Queue one message: an opaque `tag`, and contiguous buffers that arrive as one.

        The buffers are not copied and must not change until the message is acknowledged. Urgent messages go before
        all others; bulk messages of one `flow` keep their order, and flows share a link fairly.

        Returns at once if there is room. There always is for an urgent message, and for any message while none waits.
        Otherwise it waits up to `timeout_s` for room, and then raises `QueueFull`. Only the I/O threads of both ends
        make room, so two threads that wait in `send` cannot wait for each other. Raises `IsthmusError` if the endpoint
        is closed.
        """
        assert not timeout_s or threading.current_thread() is not self._thread, "only the I/O thread makes room"
        message = _message(tag, buffers, self._engine.generation, urgent, flow)
        if len(tag) > self._limits.max_tag_bytes or message.total_bytes > self._limits.max_message_bytes:
            raise IsthmusError(
                f"a message to {plain(peer)} with a tag of {len(tag)} and a payload of {message.total_bytes} bytes; "
                f"at most {self._limits.max_tag_bytes} and {self._limits.max_message_bytes} are allowed"
            )
        with self._settled:
            room = urgent or self._settled.wait_for(lambda: self._stopped or self._has_room(message), timeout_s)
            if not room:
                raise QueueFull(
                    f"{plain(self.name)}: {self._queued_bytes} bytes wait to be sent; the limit is "
                    f"{self._limits.max_queued_bytes}, and the network ({self._engine.profile}) is slower than the "
                    "sender"
                )
            self._count(message)
        self._submit(lambda: self._engine.send(peer, message))

    def pass_on(self, peer: str, tag: bytes, buffer: Buffer, generation: int, *, flow: int = 0) -> None:
        """Queue a bulk message that another peer has sent in `generation`. There always is room for it, since its
        bytes are in memory already. It is dropped if that generation is over. The I/O thread may call this too."""
        message = _message(tag, [buffer], generation, False, flow)
        with self._settled:
            self._count(message)
        self._submit(lambda: self._engine.send(peer, message))

    def set_generation(self, generation: int) -> None:
        """Set the membership's version: messages sent from now on have it, and arriving ones of older versions drop.

        Bulk messages of older generations that still have bytes to send are dropped too. An endpoint begins in
        generation 0, which stands apart and is never stale, so that processes which are not members can be heard.
        """
        self._engine.generation = generation
        self._submit(lambda: self._engine.retire(generation))

    def reshape(self, profile: Profile) -> None:
        """Take another profile at the I/O thread's next turn: rates, latencies, links that are cut or healed.

        Nothing in flight is lost, and order is kept. Nothing passes a link that is cut, and its peers count as silent
        after the usual time. The sender shapes, so every endpoint needs this call. Raises `ConfigError` if the scope or
        the dilation differs: they cannot change in a run.
        """
        self.follow(Schedule(profile), 0.0)

    def follow(self, schedule: Schedule, began: float) -> None:
        """Apply `schedule`, whose time 0 is `began` on the monotonic clock; each change is as in `reshape`.

        A later schedule replaces this one.
        """
        for key in ("scope", "dilation"):
            before, after = getattr(self._engine.profile, key), getattr(schedule.profile, key)
            if before != after:
                raise ConfigError(f"net.{key} = {after!r}: expected {before!r}; it cannot change in a run")
        self._submit(lambda: self._engine.follow(schedule, began))

    def forget(self, peer: str) -> None:
        """Drop the peer, its waiting messages, its unfinished messages, and the connection to it. Its counters stay.

        If it sends again, it is a new peer.
        """
        self._submit(lambda: self._engine.forget(peer))

    def counters(self) -> dict[str, LinkCounters]:
        """A copy of the totals for each peer."""
        return self._engine.peers.counters()

    def door(self) -> DoorCounters | None:
        """A copy of the totals of inbound connections; None if all may call."""
        return copy.copy(self._sockets.door)

    def is_idle(self, most_messages: int) -> bool:
        """Whether no bulk waits to be acknowledged, and fewer than so many messages in all."""
        with self._settled:
            return not self._queued_bytes and self._queued_messages < most_messages

    def seen_from(self, peer: str) -> str:
        """The IP address that this peer calls from; empty if it does not. Only the receiver's methods may call this."""
        return self._sockets.seen_from(peer)

    def flush(self, timeout_s: float) -> bool:
        """Wait until all sent messages are acknowledged; False if that takes longer than `timeout_s`."""
        with self._settled:
            done = self._settled.wait_for(lambda: not self._queued_messages or self._stopped, timeout_s)
            return done and not self._queued_messages

    def close(self, timeout_s: float = 5.0) -> None:
        """Send the owed acknowledgements, drop all messages (see `flush`), and end the thread. May be called twice."""
        deadline = _clock() + timeout_s
        self._submit(lambda: self._engine.begin_to_close(deadline))
        self._thread.join(timeout_s + 2 * _LINGER_S)
        if self._thread.is_alive():
            name = plain(self.name)
            raise IsthmusError(
                f"{name}: the I/O thread did not end within {timeout_s:g} s, because a callback blocks it"
            )

    def _has_room(self, message: Message) -> bool:
        return not self._queued_bytes or self._queued_bytes + message.total_bytes <= self._limits.max_queued_bytes

    def _count(self, message: Message) -> None:
        if self._stopped:
            raise IsthmusError(f"{plain(self.name)}: the endpoint is closed")
        if not message.urgent:
            self._queued_bytes += message.total_bytes
        self._queued_messages += 1

    def _submit(self, command: Callable[[], None]) -> None:
        self._commands.append(command)
        with self._settled:  # flag and wake-up change together, or a late wake-up would keep the thread busy
            if not self._awake and not self._stopped:
                self._awake = True
                self._sockets.wake()

    # ── The I/O thread ───────────────────────────────────────────────────────────────────────────────────────────

    def _run(self) -> None:
        engine = self._engine
        try:
            while _clock() < engine.closing_by:
                if self._awake:
                    self._obey()
                if not engine.turn():
                    self._sockets.wait(engine.next_time() - _clock())
        except BaseException as error:
            self._receiver.failed(IsthmusError(f"{plain(self.name)}: the I/O thread failed: {error!r}"))
            raise
        finally:
            with self._settled:
                self._stopped = True
                self._settled.notify_all()
            self._sockets.close(_LINGER_S)

    def _obey(self) -> None:
        with self._settled:  # before the queue is emptied, so that a later command wakes the thread again
            self._awake = False
            self._sockets.woken()
        while self._commands:
            self._commands.popleft()()

    def _settle(self, messages: Sequence[Message]) -> None:
        """These messages have been acknowledged or dropped."""
        if not messages:
            return
        with self._settled:
            self._queued_messages -= len(messages)
            self._queued_bytes -= sum(message.total_bytes for message in messages if not message.urgent)
            self._settled.notify_all()


def _message(tag: bytes, buffers: Sequence[Buffer], generation: int, urgent: bool, flow: int) -> Message:
    views = [memoryview(buffer) for buffer in buffers]
    parts = [view.cast("B") for view in views if view.nbytes]
    return Message(tag, parts, generation=generation, urgent=urgent, flow=flow, queued_at=_clock())


def _check_name(name: str, key: str, max_bytes: int) -> None:
    if not name or not name.isprintable() or not name.isascii() or len(name) > max_bytes or name == STRANGERS:
        raise ConfigError(f"{key} = {name!r}: expected 1 to {max_bytes} printable ASCII characters")
