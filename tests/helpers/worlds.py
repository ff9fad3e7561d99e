"""Ranks and chunks for the unit tests of the node floor: every world and mode, losses and gradients by rank.

`small` has the models; here they are run: over `threads`, a dictionary in place of sockets, or over a `Loop`, which
joins real wires and inboxes on the spot.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from coordinator.assignment import Assignment
from helpers.small import small_model
from helpers.threads import ThreadWire, run_ranks
from netem.config import convert
from node.config import Config
from node.data.batches import Contexts
from node.exchange.chunks import ChunkExchange, ChunkWire
from node.exchange.inbox import Inbox, Members
from node.exchange.passes import PassSpec
from node.exchange.wire import Wire
from node.measure.spans import Spans
from node.model.exchanged import ExchangedLlama
from node.train.from_config import payload_format
from node.train.passes import loss_sum

torch.set_num_threads(1)  # ranks are threads already

DEFAULTS: dict[str, dict[str, Any]] = {
    "model": {"layers": 3, "d_model": 32, "heads": 4, "kv_heads": 2, "ffn_dim": 48, "context": 32, "chunks": 4},
    "compress": {
        "k_share": 0.8,
        "v_share": 0.6,
        "format": "float32",
        "dense_last_layers": 1,
        "warmup_steps": 2,
        "warmup_share": 0.5,
        "calibration_batches": 2,
    },
    "train": {
        "batch": 2,
        "steps": 6,
        "lr_warmup_steps": 2,
        "lr": 1e-2,
        "eval_batches": 2,
        "sync_format": "float32",  # what is averaged, to the last bits
    },
}

WORLDS = {
    "1": [[0, 1, 2, 3]],
    "2x2": [[0, 1], [2, 3]],
    "3+1": [[0, 1, 2], [3]],
    "1+3": [[0], [1, 2, 3]],
    "zigzag": [[0, 3], [1, 2]],
    "4": [[0], [1], [2], [3]],
}
"""Who owns which of four chunks, by rank."""

MODES: dict[str, dict[str, Any]] = {
    "dense": {"mode": "dense"},
    "local": {"mode": "local"},
    "geodesic": {"rotation": "geodesic"},
    "geodesic, a basis a head": {"rotation": "geodesic", "scope": "head"},
    "taylor2, frobenius": {"rotation": "taylor2"},
    "taylor2, spectral, a basis a head": {"rotation": "taylor2", "generator_norm": "spectral", "scope": "head"},
    "fixed": {"rotation": "fixed"},
    "fixed, a basis a head": {"rotation": "fixed", "scope": "head"},
    "learned": {"rotation": "fixed", "subspace": "learned"},
    "centred": {"rotation": "fixed", "subspace": "learned", "centred": True},
    "whitened": {"rotation": "fixed", "subspace": "learned", "centred": True, "whitened": True},
    "learned, a basis a head": {"rotation": "fixed", "subspace": "learned", "scope": "head", "dense_last_layers": 0},
    "random": {"rotation": "random"},
    "random, a basis a head": {"rotation": "random", "scope": "head"},
    "exact": {"rotation": "exact", "generator_norm": "spectral"},
    "taylor2, two generators": {"rotation": "taylor2", "generators": 2},
    "two angles of the chunk before": {"generators": 2, "theta": "previous", "scope": "head"},
    "own projected, theta of the chunk before": {"own": "projected", "theta": "previous", "dense_last_layers": 0},
    "own projected, theta of the first token": {"own": "projected", "theta": "first"},
    "only the last layer sees far, whole": {"mode": "dense", "remote_last_layers": 1},
    "only the last layer sees far, compressed": {"remote_last_layers": 1, "dense_last_layers": 0},
}
"""Every way to exchange keys and values, as settings of [compress]."""


def tiny_config(**sections: dict[str, Any]) -> Config:
    """Half of `small.small_config`, with these settings laid over its sections."""
    return convert(Config, {key: DEFAULTS.get(key, {}) | sections.get(key, {}) for key in DEFAULTS.keys() | sections})


def full_spec(config: Config) -> PassSpec:
    """A pass after the warm start."""
    return PassSpec(config.model.chunk_tokens, config.compress.compresses)


def sources_of(assignment: Assignment, rank: int) -> list[int]:
    """The chunks that `rank` reads and does not own."""
    return [chunk for chunk in range(assignment.n_chunks) if rank in assignment.readers_of(chunk)]


def exchange_of(config: Config, world: Sequence[Sequence[int]], rank: int, wire: ChunkWire | None) -> ChunkExchange:
    """One rank's exchange; a world of one has no wire."""
    return ChunkExchange(Assignment(world), rank, payload_format(config), wire if len(world) > 1 else None)


def logits_of(model: ExchangedLlama, tokens_CBn: Tensor, exchange: ChunkExchange, spec: PassSpec) -> Tensor:
    """Logits [C, B, n, vocab] of the own chunks' tokens, in one pass; it has no backward where gradients are off."""
    trains = torch.is_grad_enabled()
    handle = exchange.begin(spec, trains=trains)
    logits = model.logits(tokens_CBn, handle)
    if not trains:
        handle.finish_forward()
    return logits


def loss_and_gradients(
    config: Config, world: Sequence[Sequence[int]], contexts: Contexts
) -> tuple[float, dict[str, Tensor]]:
    """Loss and every parameter's gradient, summed over the ranks of `world`."""

    def work(rank: int, wire: ThreadWire) -> tuple[float, dict[str, Tensor]]:
        model = small_model(config)
        loss = loss_sum(model, exchange_of(config, world, rank, wire), contexts, full_spec(config))
        loss.backward()
        return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    parts = run_ranks(len(world), work)
    names = parts[0][1].keys()
    assert all(gradients.keys() == names for _, gradients in parts)
    total = {name: torch.stack([gradients[name] for _, gradients in parts]).sum(0) for name in names}
    return sum(loss for loss, _ in parts), total


class Loop:
    """Nodes without sockets: what one wire sends is admitted and delivered to the other's inbox at once.

    `members`, `wires` and their `recorders` are those of the latest generation, by rank; `inboxes` last, by name.
    """

    def __init__(
        self, config: Config, world: Sequence[Sequence[int]], timeout_s: float = 30.0, relays: bool = False
    ) -> None:
        self.payload = payload_format(config)
        self._relays = relays
        self._timeout_s = timeout_s
        self.names = tuple(f"node-{rank}" for rank in range(len(world)))
        self._by_name = {name: Inbox(self.payload, ring_cap_bytes=1 << 24) for name in self.names}
        self.inboxes = list(self._by_name.values())
        self.begin(1, world, self.names)

    def begin(self, generation: int, world: Sequence[Sequence[int]], names: Sequence[str]) -> None:
        """A generation of these nodes, by rank."""
        assignment = Assignment(world)
        self.members = [Members(generation, assignment, rank, tuple(names), self._relays) for rank in range(len(world))]
        for members in self.members:
            self.inbox(members).enter(members)
        self.recorders = [Spans() for _ in world]
        self.wires = [
            Wire(LoopSender(self, members), self.inbox(members), members, self.payload, self._timeout_s, recorder)
            for members, recorder in zip(self.members, self.recorders, strict=True)
        ]

    def inbox(self, members: Members) -> Inbox:
        """The inbox of one member."""
        return self._by_name[members.peers[members.rank]]

    def hand_over(self, sender: Members, peer: str, tag: bytes, body: bytes) -> None:
        """What `sender` sends, which bears its name and generation, reaches `peer`."""
        name, inbox = sender.peers[sender.rank], self._by_name[peer]
        room = inbox.admit(name, sender.generation, tag, len(body))
        if room is not None:
            room[:] = body
            inbox.deliver(name, sender.generation, tag, room)


class LoopSender:
    """One node's sending side of a `Loop`, in one generation."""

    def __init__(self, loop: Loop, members: Members) -> None:
        self._loop, self._members = loop, members

    def send(
        self, peer: str, tag: bytes, buffers: Sequence[memoryview] = (), *, flow: int = 0, timeout_s: float = 0.0
    ) -> None:
        self._loop.hand_over(self._members, peer, tag, b"".join(buffers))

    def pass_on(self, peer: str, tag: bytes, buffer: memoryview, generation: int, *, flow: int = 0) -> None:
        assert generation == self._members.generation
        self._loop.hand_over(self._members, peer, tag, bytes(buffer))
