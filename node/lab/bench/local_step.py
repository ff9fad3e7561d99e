"""Training steps without a network: `python -m node.lab.bench.local_step CONFIG plain|isthmus`.

"plain" is the Llama of `node.model.llama` with torch's attention over the whole context; "isthmus" is one node that
owns all chunks. Both make the same step: forward, backward, clipping, the optimizer. It prints "ready", then answers
each line of input, a number of steps, by one line of JSON: the times, and the peak of the process's memory so far.
`local` is the other side.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from netem.children import end_with_parent
from node.config import Config, load_config
from node.data import open_data
from node.data.batches import Contexts
from node.data.task import count_asked
from node.exchange.chunks import ChunkExchange
from node.exchange.passes import PassSpec
from node.lab.tunnel.bench_node import Void
from node.model.llama import Llama, Step
from node.train.from_config import drawn_model, payload_format
from node.train.optimizer import clip_gradients, make_optimizer, set_learning_rate
from node.train.passes import loss_sum, own_tokens

Loss = Callable[[Contexts], Tensor]


def plain(config: Config, vocab_size: int) -> tuple[nn.Module, Loss]:
    """A plain Llama, and its loss (nats, summed) of a batch of contexts."""
    model, tokens = Llama(config.model, vocab_size, config.run.seed), config.model.context

    def loss(contexts: Contexts) -> Tensor:
        inputs, targets = own_tokens(contexts, (0,), PassSpec(tokens, False), torch.device("cpu"))
        logits = model(inputs[0], Step(model.rope(torch.device("cpu")), torch.arange(tokens)))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")

    return model, loss


def isthmus(config: Config, vocab_size: int) -> tuple[nn.Module, Loss]:
    """One node that owns all chunks, and its loss."""
    payload = payload_format(config)
    model = drawn_model(config, vocab_size, payload.ranks)
    exchange = ChunkExchange(config.assignment(), 0, payload, Void())
    spec = PassSpec(config.model.chunk_tokens, False)
    return model, lambda contexts: loss_sum(model, exchange, contexts, spec)


def main(arguments: list[str]) -> int:
    """Make steps as each line of input asks, until it ends."""
    end_with_parent()
    config = load_config(Path(arguments[0]))
    torch.set_num_threads(1)
    task = open_data(config.data)
    model, loss = {"plain": plain, "isthmus": isthmus}[arguments[1]](config, task.vocab_size)
    optimizer = make_optimizer(model, config.train)
    set_learning_rate(optimizer, config.train.lr)
    sampler = task.sampler(config.model.context, config.train.batch, config.run.seed)
    cursor = 0
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        times_s = []
        for _ in range(int(line)):
            contexts = sampler.contexts(cursor)
            cursor += config.train.batch
            began = time.monotonic()
            optimizer.zero_grad()
            (loss(contexts) / count_asked(contexts)).backward()
            clip_gradients(model, config.train.grad_clip)
            optimizer.step()
            times_s.append(time.monotonic() - began)
        print(json.dumps({"times_s": times_s, "peak_bytes": peak_bytes()}), flush=True)
    return 0


def peak_bytes() -> int:
    """The most memory that this process has had resident, by Linux's count."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
