"""The ring: the same bits on every rank, the right sum, the bytes of the formula."""

from __future__ import annotations

import pytest
import torch
from helpers.threads import Post, ThreadWire, run_ranks
from helpers.worlds import WORLDS, Loop, tiny_config
from torch import Tensor

from coordinator import ring
from node.measure.spans import Spans
from node.train import averaging
from node.train.averaging import Averager, all_reduce, flatten, unflatten_into

LENGTHS = [1, 2, 3, 7, 64, 100]


def vector(rank: int, length: int) -> Tensor:
    return torch.randn(length, generator=torch.Generator().manual_seed(100 * rank + length))


def assert_sums(found: list[Tensor], length: int) -> None:
    exact = torch.stack([vector(rank, length).double() for rank in range(len(found))]).sum(0)
    assert all(torch.equal(one, found[0]) for one in found)
    torch.testing.assert_close(found[0].double(), exact, rtol=1e-6, atol=1e-6)
    assert found[0].dtype is torch.float32


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_rank_has_the_same_bits_and_they_are_the_sum(
    monkeypatch: pytest.MonkeyPatch, world_size: int, length: int
) -> None:
    """Vectors shorter than the world, and vectors of several buckets of which the last is shorter."""
    monkeypatch.setattr(averaging, "BUCKET_ELEMENTS", 30)

    def work(rank: int, wire: ThreadWire) -> tuple[Tensor, int]:
        return all_reduce(vector(rank, length), rank, world_size, wire, 7).total, wire.sent_bytes["averaging"]

    results = run_ranks(world_size, work)
    assert_sums([total for total, _ in results], length)
    buckets = [len(part) for part in torch.zeros(length).split(30)]
    for rank, (_, sent) in enumerate(results):
        assert sent == sum(ring.bytes_sent(size, 4, world_size, rank) for size in buckets)


def test_over_real_wires() -> None:
    """Shards go as tags and buffers, and arrive in memory of their own."""
    loop = Loop(tiny_config(), WORLDS["4"])
    found = run_ranks(4, lambda rank, _: all_reduce(vector(rank, 50), rank, 4, loop.wires[rank], 3).total)
    assert_sums(found, 50)


def test_the_own_vector_and_what_was_sent_stay_as_they_are() -> None:
    """The endpoint may still be sending."""

    class Watchful(ThreadWire):
        def __init__(self, post: Post, rank: int) -> None:
            super().__init__(post, rank)
            self.sent: list[tuple[Tensor, Tensor]] = []

        def send_shard(self, rank: int, round_id: int, hop: int, bucket: int, shard: Tensor) -> None:
            self.sent.append((shard, shard.clone()))
            super().send_shard(rank, round_id, hop, bucket, shard)

    def work(rank: int, wire: ThreadWire) -> None:
        watchful, own = Watchful(wire._post, rank), vector(rank, 40)
        total = all_reduce(own, rank, 3, watchful, 7).total
        total.zero_()
        assert torch.equal(own, vector(rank, 40))
        assert all(torch.equal(*pair) for pair in watchful.sent)

    run_ranks(3, work)


def test_a_result_is_used_only_once_it_is_agreed_on() -> None:
    class Counted:
        def __init__(self) -> None:
            self.votes: list[tuple[int, bool, str]] = []

        def vote(self, round_id: int, ok: bool, digest: str, reason: str = "") -> object:
            self.votes.append((round_id, ok, digest))
            if round_id == 13:
                raise RuntimeError("aborted")
            return None

    sessions = [Counted(), Counted()]

    def work(rank: int, wire: ThreadWire) -> Tensor:
        spans = Spans()
        averager = Averager(rank, 2, wire, sessions[rank], spans)
        total = averager.total(12, vector(rank, 9))
        assert spans.end().accounts_s["averaging"] > 0
        with pytest.raises(RuntimeError, match="aborted"):
            averager.total(13, vector(rank, 9))
        return total

    assert_sums(run_ranks(2, work), 9)
    assert sessions[0].votes == sessions[1].votes
    assert [(round_id, ok) for round_id, ok, _ in sessions[0].votes] == [(12, True), (13, True)]


def test_flat_vectors_come_back() -> None:
    tensors = [torch.randn(2, 3), torch.randn(()), torch.randn(4, 2).mT, torch.randn(3, dtype=torch.float64)]
    flat = flatten(tensors)
    assert (flat.shape, flat.dtype) == ((6 + 1 + 8 + 3,), torch.float32)
    copies = [torch.zeros_like(tensor) for tensor in tensors]
    unflatten_into(flat, copies)
    for copy, tensor in zip(copies, tensors, strict=True):
        assert torch.equal(copy.float(), tensor.float())
        assert (copy.dtype, copy.shape) == (tensor.dtype, tensor.shape)


def test_a_flat_vector_is_memory_of_its_own() -> None:
    tensor = torch.zeros(3)
    flat = flatten([tensor])
    tensor += 1
    assert torch.count_nonzero(flat) == 0


def test_a_vector_of_another_length_is_our_own_fault() -> None:
    with pytest.raises(AssertionError):
        unflatten_into(torch.zeros(5), [torch.zeros(4)])
