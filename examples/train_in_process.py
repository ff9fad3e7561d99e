"""Train one small model twice, on one node and on four, in this process, and see that the losses are equal.

The nodes are threads that exchange payloads in memory (`node.lab.in_process`): the arithmetic is that of a real run,
without a network. Keys and values are compressed after the first two steps; gradients are averaged in every step.
Run it with `python examples/train_in_process.py`; the novels are tokenized once, into Isthmus's cache.
"""

from __future__ import annotations

import torch

from node.config import load_config
from node.data import open_data
from node.lab.in_process import train_in_process
from node.model.exchanged import ExchangedLlama
from node.train.attempt import Metrics
from node.train.from_config import payload_format

STEPS = 8
SETTINGS = [
    *("--model.layers=2", "--model.d_model=64", "--model.heads=4", "--model.kv_heads=2", "--model.ffn_dim=128"),
    *("--model.context=128", "--model.chunks=4"),
    *("--compress.k_share=0.8", "--compress.v_share=0.7", "--compress.warmup_steps=2"),
    "--compress.format=float32",  # bfloat16, the default, rounds what crosses: losses are then equal but for that
    *(f"--train.steps={STEPS}", "--train.batch=2", "--train.lr=1e-3", "--train.lr_warmup_steps=2"),
    *("--train.sync_every=1", "--data.tokenizer=bytes", "--data.max_tokens=200_000"),
]
"""As on the command line of `isthmus run`; settings may also come from a TOML file, whose path `load_config` takes."""


def losses(nodes: int) -> list[float]:
    """The training loss of every step, with the model's four chunks dealt to this many nodes."""
    config = load_config(None, [*SETTINGS, f"--coordinator.nodes={nodes}"])
    found: list[float] = []

    def watch(model: ExchangedLlama, step: int, metrics: list[Metrics]) -> None:
        """Called after each step, with the figures of all nodes; before the first step it is called with none."""
        if metrics:
            found.append(sum(part["loss_sum"] for part in metrics) / sum(part["tokens"] for part in metrics))

    train_in_process(config, open_data(config.data), [payload_format(config) for _ in range(nodes)], watch)
    return found


def main() -> None:
    torch.set_num_threads(1)  # tensors are small, and the nodes are threads already
    alone, together = losses(nodes=1), losses(nodes=4)
    print("step   1 node     4 nodes    difference")
    for step, (one, four) in enumerate(zip(alone, together, strict=True), start=1):
        print(f"{step:4}   {one:.6f}   {four:.6f}   {abs(four - one):.1e}")
    largest = max(abs(four - one) / one for one, four in zip(alone, together, strict=True))
    print(f"The largest difference is {largest:.1e} of the loss: sums in float32 are taken in another order.")


if __name__ == "__main__":
    main()
