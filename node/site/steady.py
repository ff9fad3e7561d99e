"""A column's wire that never breaks a pass off: what cannot come is zeros, and the site learns of it afterwards.

In the middle of a pass the processes of a site meet in collectives. One that left it there, because its generation is
over or its peer is late, would leave the others waiting. So it goes on without the network, sends nothing more, and
`Site.check` raises the reason on all processes once the pass is through. Nothing of such a pass is used.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from netem.errors import IsthmusError
from node.exchange.chunks import ChunkWire
from node.exchange.formats import Packed, TensorSpec
from node.exchange.passes import PassKey
from node.site.site import Site


class SteadyWire:
    """`node.exchange.chunks.ChunkWire` over another one."""

    def __init__(self, wire: ChunkWire, site: Site) -> None:
        self._wire = wire
        self._site = site

    def begin(self, number: int) -> None:
        self._try(lambda: self._wire.begin(number))

    def end(self, number: int) -> None:
        self._wire.end(number)  # it waits for nothing

    def send(self, rank: int, kind: str, layer: int, chunk: int, key: PassKey, tensors: Packed) -> None:
        self._try(lambda: self._wire.send(rank, kind, layer, chunk, key, tensors))

    def publish(self, ranks: tuple[int, ...], layer: int, chunk: int, key: PassKey, tensors: Packed) -> None:
        self._try(lambda: self._wire.publish(ranks, layer, chunk, key, tensors))

    def first_of(self, kind: str, layer: int, chunks: dict[int, int], number: int) -> int:
        found: list[int] = []
        self._try(lambda: found.append(self._wire.first_of(kind, layer, chunks, number)))
        return found[0] if found else min(chunks)

    def take(
        self,
        kind: str,
        layer: int,
        chunk: int,
        rank: int,
        number: int,
        specs: tuple[TensorSpec, ...],
        device: torch.device,
    ) -> Packed:
        found: list[Packed] = []
        self._try(lambda: found.append(self._wire.take(kind, layer, chunk, rank, number, specs, device)))
        return found[0] if found else tuple(torch.zeros(spec.shape, dtype=spec.dtype, device=device) for spec in specs)

    def _try(self, work: Callable[[], None]) -> None:
        if self._site.is_broken:
            return
        try:
            work()
        except IsthmusError as error:
            self._site.note(error)
