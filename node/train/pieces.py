"""A node's state as a catalogue and bytes, for a node that joins (`node.train.transfer`), and back.

What all members have agreed on comes first, in the same order at each of them, and so in the same pieces: weights,
basis and the outer step's momentum. The optimizer's moments follow. Running second moments are parts of a sum over
nodes: a joiner begins with zeros, for which only names and shapes are sent. What averaging has left out stays with its
node.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import msgspec
import torch
from torch import Tensor

from netem.errors import ProtocolError
from node.train.agreed import RESIDUAL
from node.train.shards import RUNNING
from node.train.tensor_files import TYPES
from node.train.transfer import PIECE_BYTES, Catalogue, Entry, digest_of_piece

MOMENTS = "optimizer."
"""Before the names of the optimizer's tensors."""

_DTYPES = {name: dtype for dtype, name in TYPES.items()}


@dataclass(frozen=True)
class Packed:
    """A state in one buffer, with its catalogue."""

    catalogue: Catalogue
    data: memoryview

    def piece(self, index: int) -> memoryview:
        """The bytes of one piece."""
        return self.data[index * PIECE_BYTES : index * PIECE_BYTES + self.catalogue.piece_bytes(index)]


def pack(tensors: Mapping[str, Tensor], step: int) -> Packed:
    """Copy a state, as `node.train.checkpoint` names its tensors, into one buffer."""
    names = sorted((name for name in tensors if name != RESIDUAL), key=lambda name: (name.startswith(MOMENTS), name))
    entries = tuple(
        Entry(name, TYPES[tensors[name].dtype], tuple(tensors[name].shape), name.startswith(RUNNING)) for name in names
    )
    parts = [_bytes_of(tensors[entry.name]) for entry in entries if not entry.empty]
    whole = torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)
    data = memoryview(whole.numpy())  # type: ignore[arg-type]
    digests = tuple(digest_of_piece(data[at : at + PIECE_BYTES]) for at in range(0, len(data), PIECE_BYTES))
    return Packed(Catalogue(step, len(data), entries, digests), data)


def unpack(catalogue: Catalogue, data: memoryview) -> dict[str, Tensor]:
    """The tensors of a state that has come. Raises `ProtocolError` where the catalogue does not fit its own bytes."""
    return dict(_cut(catalogue, data))


def _cut(catalogue: Catalogue, data: memoryview) -> Iterator[tuple[str, Tensor]]:
    whole = torch.frombuffer(data, dtype=torch.uint8) if len(data) else torch.empty(0, dtype=torch.uint8)
    start = 0
    for entry in catalogue.tensors:
        dtype = _DTYPES.get(entry.dtype)
        if dtype is None:
            raise ProtocolError(f"{entry.name} is of type {entry.dtype!r}, which no state has")
        if entry.empty:
            if not entry.name.startswith(RUNNING) or math.prod(entry.shape) > MOST_EMPTY:
                raise ProtocolError(f"{entry.name} is empty, and has the shape {entry.shape}")
            yield entry.name, torch.zeros(entry.shape, dtype=dtype)
            continue
        nbytes = math.prod(entry.shape) * dtype.itemsize
        if start + nbytes > len(data):
            raise ProtocolError(f"{entry.name} goes beyond the {len(data)} bytes of its state")
        # A copy: what it is cut from may not be aligned for its type.
        yield entry.name, whole[start : start + nbytes].clone().view(dtype).reshape(entry.shape)
        start += nbytes
    if start != len(data):
        raise ProtocolError(f"the tensors of a state have {start} bytes, and it has {len(data)}")


MOST_EMPTY = 1 << 30
"""Elements of a tensor of zeros, at most."""


def encode_catalogue(catalogue: Catalogue) -> bytes:
    """A catalogue as the payload of an `Offer`."""
    return msgspec.msgpack.encode(catalogue)


def decode_catalogue(data: memoryview, peer: str) -> Catalogue:
    """Read a catalogue that came from `peer`. Raises `ProtocolError`."""
    try:
        return msgspec.msgpack.decode(data, type=Catalogue)
    except msgspec.MsgspecError as error:
        raise ProtocolError(f"a catalogue that does not fit: {error}", peer=peer) from None


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
