"""A door before one node: peers connect here, and what passes to and from the node is harmed as it is told.

`python -m node.lab.chaos.door PORT` stands before 127.0.0.1:PORT. It prints its own port, then takes one line of JSON
for each change: {"kind": "delay", "seed": 7}, or {"kind": null} for none. What is held back while it is deaf or mute
goes on afterwards, as on a link that was cut; TCP loses and repeats nothing by itself, so neither does the door.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from contextlib import suppress
from dataclasses import dataclass, field

from netem.children import end_with_parent
from node.lab.chaos.schedule import Kind

PIECE_BYTES = 64 << 10
CORRUPT_CHANCE = 0.02
"""Chance that a piece that passes has one bit flipped."""
TRUNCATE_CHANCE = 0.02
"""Chance that a connection breaks off in the middle of a piece."""
LONGEST_DELAY_S = 0.25


@dataclass
class Harm:
    """What happens to what passes, at this time. The random choices are those of `seed`."""

    kind: Kind | None = None
    source: random.Random = field(default_factory=random.Random)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def become(self, kind: Kind | None, seed: int) -> None:
        """From now on this happens."""
        self.kind = kind
        self.source.seed(seed)
        self.changed.set()
        self.changed = asyncio.Event()

    async def passage(self, inward: bool) -> None:
        """Wait while nothing may pass in this direction."""
        while self.kind is Kind.CUT or self.kind is (Kind.DEAF if inward else Kind.MUTE):
            await self.changed.wait()

    async def harmed(self, piece: bytes, inward: bool) -> tuple[bytes, bool]:
        """What becomes of a piece that passes, and whether the connection breaks off after it."""
        if not inward:
            return piece, False
        if self.kind is Kind.DELAY:
            await asyncio.sleep(self.source.uniform(0, LONGEST_DELAY_S))
        elif self.kind is Kind.CORRUPT and self.source.random() < CORRUPT_CHANCE:
            return flipped(piece, self.source), False
        elif self.kind is Kind.TRUNCATE and self.source.random() < TRUNCATE_CHANCE:
            return piece[: self.source.randrange(len(piece))], True
        return piece, False


def flipped(piece: bytes, source: random.Random) -> bytes:
    """The same with one bit changed."""
    place = source.randrange(8 * len(piece))
    harmed = bytearray(piece)
    harmed[place // 8] ^= 1 << place % 8
    return bytes(harmed)


async def serve(port: int) -> None:
    """Stand before `port` until the input ends."""
    harm = Harm()

    async def meet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            to_node, from_node = (await asyncio.open_connection("127.0.0.1", port))[::-1]
        except OSError:  # the node is not there at this time; the caller tries again
            writer.close()
            return
        with suppress(asyncio.CancelledError):  # the door is closed; asyncio would print that
            await asyncio.gather(
                _pump(reader, to_node, harm, inward=True), _pump(from_node, writer, harm, inward=False)
            )

    server = await asyncio.start_server(meet, "127.0.0.1", 0)
    print(json.dumps({"port": server.sockets[0].getsockname()[1]}), flush=True)
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        told = json.loads(line)
        harm.become(None if told["kind"] is None else Kind(told["kind"]), told.get("seed", 0))


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, harm: Harm, *, inward: bool) -> None:
    with suppress(OSError):
        while piece := await reader.read(PIECE_BYTES):
            await harm.passage(inward)
            piece, ends = await harm.harmed(piece, inward)
            writer.write(piece)
            await writer.drain()
            if ends:
                writer.transport.abort()
                break
    with suppress(OSError):
        writer.close()


def main() -> None:
    """Run until the input ends."""
    end_with_parent()
    asyncio.run(serve(int(sys.argv[1])))


if __name__ == "__main__":
    main()
