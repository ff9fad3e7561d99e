"""Compress the keys of one layer as a node does before it sends them, and see what is left of them.

This uses the codec alone, on activations that are made up: most of their energy lies in a few directions, which turn a
little from one chunk to the next. Run it with `python examples/compress_keys.py`.

Shapes: C chunks, B contexts, n tokens of a chunk, K = d_kv, G groups, r rank.
"""

from __future__ import annotations

import torch

from node.subspace.basis import group_moments, kept_energy
from node.subspace.codec import Codec, CodecShape
from node.subspace.rotation import make_rotation

CHUNKS, CONTEXTS, TOKENS, WIDTH = 4, 2, 128, 256
RANK, STRONG, NOISE, TURN = 16, 12, 0.05, 0.1
LAYER_0_KEYS = (0, "k")


def made_up_keys() -> torch.Tensor:
    """Keys [C, B, n, K]: STRONG directions, turned a little in each chunk, and a little noise in all others."""
    source = torch.Generator().manual_seed(0)
    directions_Ks = torch.randn(WIDTH, STRONG, generator=source)
    chunks = []
    for _ in range(CHUNKS):
        turned_Ks = torch.linalg.qr(directions_Ks + TURN * torch.randn(WIDTH, STRONG, generator=source)).Q
        coordinates_Bns = torch.randn(CONTEXTS, TOKENS, STRONG, generator=source)
        noise_BnK = NOISE * torch.randn(CONTEXTS, TOKENS, WIDTH, generator=source)
        chunks.append(coordinates_Bns @ turned_Ks.T + noise_BnK)
    return torch.stack(chunks)


def main() -> None:
    z_CBnK = made_up_keys()

    # The basis: principal directions of the activations' second moments, which all nodes sum among them in a real run.
    rotation = make_rotation("geodesic", seed=0, norm="frobenius")
    shape = CodecShape(groups=1, width=WIDTH, rank=RANK, parameters=rotation.parameters)
    codec = Codec({LAYER_0_KEYS: shape}, LAYER_0_KEYS, rotation, clip=0.5, seed=0)
    moments_GKK = group_moments(z_CBnK, groups=1)
    codec.set_moments(moments_GKK)
    basis_GKr, _ = codec.matrices()

    # The owner encodes its chunks: coordinates Zcomp [C, B, n, r], and θ [C, B, m], which says how the basis is turned
    # (not at all here: the map from a chunk to its θ is trained, and starts at zero).
    payload = codec.encode(z_CBnK, chunks=tuple(range(CHUNKS)))

    # A reader decodes the payload of each chunk.
    with torch.no_grad():
        decoded = [codec.decode(tuple(part[chunk] for part in payload), torch.float32) for chunk in range(CHUNKS)]
    lost = (z_CBnK - torch.stack(decoded)).square().sum() / z_CBnK.square().sum()

    sent_bytes = sum(part.nbytes for part in payload)
    print(f"keys        {tuple(z_CBnK.shape)}: {z_CBnK.nbytes:,} bytes")
    print(f"payload     {' and '.join(str(tuple(part.shape)) for part in payload)}: {sent_bytes:,} bytes")
    print(f"saved       {1 - sent_bytes / z_CBnK.nbytes:.2%} of the bytes")
    print(f"kept        {1 - lost.item():.2%} of the energy after decoding")
    print(
        f"basis       {kept_energy(moments_GKK, basis_GKr):.2%} of the energy lies in its {RANK} directions of {WIDTH}"
    )


if __name__ == "__main__":
    main()
