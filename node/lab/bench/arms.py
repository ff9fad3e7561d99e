"""Who takes part in the benchmark: the peers over torch.distributed, and Isthmus in its settings."""

from __future__ import annotations

from typing import Literal, NamedTuple

Method = Literal["gather", "zigzag", "ulysses", "ring"]
_DENSE = "--compress.mode=dense"


class PeerArm(NamedTuple):
    """Context parallelism over torch.distributed (gloo)."""

    method: Method
    wire: Literal["float32", "bfloat16"] = "float32"
    """The number format in which keys, values and their gradients cross."""

    @property
    def name(self) -> str:
        return f"{_METHODS[self.method]}, {'bf16' if self.wire == 'bfloat16' else self.wire}"


class NodeArm(NamedTuple):
    """Isthmus: a preset, settings beside it, and how many passes take turns in a step."""

    what: str
    settings: tuple[str, ...]
    micro_batches: int = 1
    preset: str = ""

    @property
    def name(self) -> str:
        passes = "" if self.micro_batches == 1 else f", {self.micro_batches} passes"
        return f"isthmus {self.what}{passes}"

    @property
    def compresses(self) -> bool:
        """Whether the target of compressed runs is meant for it."""
        return _DENSE not in self.settings


_METHODS = {
    "gather": "all-gather",
    "zigzag": "all-gather zigzag",
    "ulysses": "Ulysses",
    "ring": "torch ring",
}

BASELINE = PeerArm("gather")
"""What the ratios are ratios to."""

PEERS = (
    BASELINE,
    PeerArm("gather", "bfloat16"),
    PeerArm("zigzag"),
    PeerArm("zigzag", "bfloat16"),
    PeerArm("ulysses"),
    PeerArm("ulysses", "bfloat16"),
    PeerArm("ring"),
)

_UNCOMPRESSED = NodeArm("uncompressed, float32", (_DENSE, "--compress.format=float32"))
_UNCOMPRESSED_HALF = NodeArm("uncompressed, bf16", (_DENSE, "--compress.format=bfloat16"))
_PAPER = NodeArm("paper preset", (), preset="paper")
_ALL_LAYERS = NodeArm(
    "all layers compressed, bf16",
    ("--compress.mode=subspace", "--compress.dense_last_layers=0", "--compress.format=bfloat16"),
)
NODES = tuple(
    arm._replace(micro_batches=count)
    for arm in (_UNCOMPRESSED, _UNCOMPRESSED_HALF, _PAPER, _ALL_LAYERS)
    for count in (1, 2)
)

QUICK_PEERS = (BASELINE, PeerArm("gather", "bfloat16"))
QUICK_NODES = tuple(arm._replace(micro_batches=count) for arm in (_UNCOMPRESSED, _ALL_LAYERS) for count in (1, 2))

SCALED_NODES = (_UNCOMPRESSED._replace(micro_batches=2), _ALL_LAYERS._replace(micro_batches=2))
"""Those of the scaling over nodes, context and rate; the baseline is the peer there."""
