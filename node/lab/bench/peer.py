"""One process of a peer: `python -m node.lab.bench.peer CONFIG RANK RANKS tcp://HOST:PORT`.

Each line on standard input is a command in JSON, and is answered by one line. "steps" makes training steps of one arm
and returns their times; "check" compares the arm's loss and gradients with those of one process. `peers` is the other
side. A step is what `isthmus node` does between two barriers: forward, backward, clipping, the optimizer; weights are
not averaged in it.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from netem.children import end_with_parent
from node.config import Config, load_config
from node.data import open_data
from node.data.batches import Contexts
from node.data.task import count_asked
from node.exchange.passes import PassSpec
from node.lab.bench.arms import PeerArm
from node.lab.bench.collectives import GatheredAttention, Layout, UlyssesAttention, contiguous, zigzag
from node.model.llama import Attention, Llama, Step
from node.train.optimizer import clip_gradients, make_optimizer, set_learning_rate
from node.train.passes import own_tokens


class Arm:
    """One arm's model and optimizer on this rank."""

    def __init__(self, config: Config, vocab_size: int, rank: int, ranks: int, arm: PeerArm) -> None:
        self._config, self._ranks = config, ranks
        layout = zigzag(ranks) if arm.method == "zigzag" else contiguous(ranks)
        self._own = layout.own_R[rank]
        self._tokens = config.model.context // len(layout.order)
        self.model = Llama(config.model, vocab_size, config.run.seed, lambda _: _attention(config, layout, rank, arm))
        self._optimizer = make_optimizer(self.model, config.train)
        set_learning_rate(self._optimizer, config.train.lr)

    def step(self, contexts: Contexts) -> None:
        """One training step, without an averaging. A rank's gradient is scaled as an `isthmus node` scales its own."""
        self._optimizer.zero_grad()
        (self.loss_sum(contexts) * (self._ranks / count_asked(contexts))).backward()
        clip_gradients(self.model, self._config.train.grad_clip)
        self._optimizer.step()

    def loss_sum(self, contexts: Contexts) -> Tensor:
        """The sum of the losses (nats) of the own chunks' targets."""
        inputs, targets = own_tokens(contexts, self._own, PassSpec(self._tokens, False), torch.device("cpu"))
        return _loss(self.model, inputs, targets, self._own, self._tokens)


class Peer:
    """All arms of one rank."""

    def __init__(self, config: Config, rank: int, ranks: int, store: str) -> None:
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
        self._config, self._rank, self._ranks = config, rank, ranks
        self._task = open_data(config.data)
        self._sampler = self._task.sampler(config.model.context, config.train.batch, config.run.seed)
        self._arms: dict[PeerArm, Arm] = {}
        self._cursor = 0

    def steps(self, arm: PeerArm, count: int) -> list[float]:
        """The times of so many steps, each from a common start to this rank's end, in seconds."""
        times_s = []
        for _ in range(count):
            contexts = self._sampler.contexts(self._cursor)
            self._cursor += self._config.train.batch
            made = self._made(arm)
            dist.barrier()
            began = time.monotonic()
            made.step(contexts)
            times_s.append(time.monotonic() - began)
        return times_s

    def check(self, arm: PeerArm) -> dict[str, float]:
        """How far loss and gradients, summed over ranks, are from those of one process: shares of the loss, and of the
        largest entry of the gradient that is farthest off."""
        contexts = self._sampler.contexts(0)
        made = Arm(self._config, self._task.vocab_size, self._rank, self._ranks, arm)
        loss = made.loss_sum(contexts)
        loss.backward()
        total = loss.detach()
        dist.all_reduce(total)
        plain = Llama(self._config.model, self._task.vocab_size, self._config.run.seed)
        inputs, targets = own_tokens(contexts, (0,), PassSpec(self._config.model.context, False), torch.device("cpu"))
        wanted = _loss(plain, inputs, targets, (0,), self._config.model.context)
        wanted.backward()
        off = 0.0
        for mine, right in zip(made.model.parameters(), plain.parameters(), strict=True):
            assert mine.grad is not None
            assert right.grad is not None
            dist.all_reduce(mine.grad)
            off = max(off, float((mine.grad - right.grad).abs().max() / right.grad.abs().max()))
        return {"loss": abs(float(total / wanted.detach()) - 1), "gradient": off}

    def _made(self, arm: PeerArm) -> Arm:
        if arm not in self._arms:
            self._arms[arm] = Arm(self._config, self._task.vocab_size, self._rank, self._ranks, arm)
        return self._arms[arm]


def _attention(config: Config, layout: Layout, rank: int, arm: PeerArm) -> Attention:
    wire = torch.bfloat16 if arm.wire == "bfloat16" else torch.float32
    if arm.method == "ulysses":
        return UlyssesAttention(config.model, wire)
    if arm.method == "ring":
        from node.lab.bench.ring import RingAttention  # private parts of torch, which may be missing

        return RingAttention(config.model)
    return GatheredAttention(config.model, layout, rank, wire)


def _loss(model: Llama, inputs_CBn: Tensor, targets_CBn: Tensor, own: tuple[int, ...], tokens: int) -> Tensor:
    starts_C = torch.tensor(own) * tokens
    positions_C1n = (starts_C[:, None] + torch.arange(tokens))[:, None]
    logits_CBnV = model(inputs_CBn, Step(model.rope(torch.device("cpu")), positions_C1n))
    return F.cross_entropy(logits_CBnV.flatten(0, 2), targets_CBn.flatten(), reduction="sum")


def _answer(peer: Peer, command: dict[str, Any]) -> Any:
    arm = PeerArm(*command["arm"])
    if command["do"] == "steps":
        return peer.steps(arm, command["count"])
    try:
        return peer.check(arm)
    except (ImportError, AttributeError, TypeError, NotImplementedError, RuntimeError) as error:
        return {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}  # torch's private parts have changed


def main(arguments: list[str]) -> int:
    """Carry out commands until the input ends."""
    end_with_parent()
    path, rank, ranks, store = arguments
    torch.set_num_threads(1)
    peer = Peer(load_config(Path(path)), int(rank), int(ranks), store)
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        print(json.dumps(_answer(peer, json.loads(line))), flush=True)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
