"""What compression costs beside a local training step: encode and decode time over the time of a step, on this CPU.

    make bench        python tests/benchmarks/codec_cost.py [CONFIG] [--tokens N] [--repeats N] [--out FILE]

The shapes are those of configs/paper-800m.toml; one chunk of N tokens in place of its 16,384. A step is `layers` times
forward and backward of one decoder layer on the own chunk: norms, projections, attention within the chunk, SwiGLU.
The embedding, the head, the optimizer and attention to other chunks, which would only make the ratio smaller, are not
in it. Against that stands what the compressed layers add, forward and backward, K and V together: encode of the own
chunk, and decode of one chunk that arrived. Both are `node.model.key_value.KeyValueCodecs` as a training pass calls it.
Packing bytes for the wire is the exchange's part, and is not in it.

What is taken is the process's CPU time, over all its threads, which a machine that is busy with something else does
not change (on an idle one it is the wall-clock's, with one thread). The three are timed in turns; a ratio is the median
of each turn's own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from helpers import ROOT
from torch import Tensor

from coordinator.assignment import assign
from node.config import Config, load_config
from node.exchange.chunks import ChunkExchange
from node.exchange.passes import PassSpec
from node.lab.study.trial import host_line
from node.model.exchanged import ChunkStep, ExchangedAttention
from node.model.key_value import key_value_codecs
from node.model.llama import Layer
from node.model.rope import Rope
from node.subspace.ranks import rank_table
from node.train.from_config import payload_format

TARGET = 0.03

PAGE = """\
# What compression costs beside a local training step

Written by `make bench`; the head of `tests/benchmarks/codec_cost.py` says what is timed.

{table}

A local step here is forward and backward of all layers on the own chunk, without embedding, head, optimizer and
attention to other chunks: with those the shares are smaller. The last node of a causal split decodes every earlier
chunk, and also attends to them, which is not in the step that it is measured against here.

```json
{record}
```
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Encode and decode time over the time of a local training step.")
    parser.add_argument("config", nargs="?", type=Path, default=ROOT / "configs" / "paper-800m.toml")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of the chunk (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="turns, after one that is left out")
    parser.add_argument("--out", type=Path, help="a Markdown file to write, too")
    options = parser.parse_args()
    config = load_config(options.config, ["--run.device=cpu", "--coordinator.nodes=1", "--coordinator.token=none"])
    timed = measure(config, options.tokens, options.repeats)
    result = figures(config, options.tokens, timed)
    print(table(result))
    print(json.dumps(result))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(PAGE.format(table=table(result), record=json.dumps(result)), encoding="utf-8")


def measure(config: Config, tokens: int, repeats: int) -> dict[str, list[float]]:
    """CPU seconds of each part in one layer, by turn."""
    exchange = ChunkExchange(assign(1, 1), 0, payload_format(config))
    works = {"layer": layer_step(config, tokens, exchange)}
    works |= codec_steps(config, tokens, exchange)
    timed: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(repeats + 1):
        for name, work in works.items():
            began = time.process_time()
            work()
            if turn:
                timed[name].append(time.process_time() - began)
    return timed


def layer_step(config: Config, tokens: int, exchange: ChunkExchange) -> Callable[[], None]:
    """Forward and backward of a layer that does not compress, on one chunk that it owns."""
    model = config.model
    layer = Layer(model, ExchangedAttention(model, model.layers - 1, None, projects_own=False))
    x_CBnd = torch.randn(1, 1, tokens, model.d_model, requires_grad=True)
    back = torch.randn(1, 1, tokens, model.d_model)
    positions = torch.arange(tokens)[None, None]
    rope = Rope(model.head_size, tokens, model.rope_theta, x_CBnd.device)
    spec = PassSpec(tokens, compressed=False)

    def work() -> None:
        forget(x_CBnd, *layer.parameters())
        step = ChunkStep(rope, positions, exchange.begin(spec, trains=True))
        layer(x_CBnd, step).backward(back)

    return work


def codec_steps(config: Config, tokens: int, exchange: ChunkExchange) -> dict[str, Callable[[], None]]:
    """Forward and backward of encode and of decode, for K and V of the first compressed layer."""
    layer, d_kv = config.compressed[0], config.model.d_kv
    codecs = key_value_codecs(config.compress, config.run.seed, rank_table(config.model, config.compress), layer)
    handle = exchange.begin(PassSpec(tokens, compressed=True), trains=True)
    for codec in (codecs.k, codecs.v):
        codec.set_basis(torch.linalg.qr(torch.randn(codec.leading.shape))[0])
    keys_values = tuple(torch.randn(1, 1, tokens, d_kv, requires_grad=True) for _ in range(2))
    payload = codecs.encode(*keys_values, handle)
    arrived = tuple(tensor[0].detach().requires_grad_() for tensor in payload)
    returned = tuple(torch.randn_like(tensor) for tensor in payload)
    back = tuple(torch.randn(1, tokens, d_kv) for _ in range(2))

    def encode() -> None:
        forget(*keys_values, *codecs.parameters())
        torch.autograd.backward(codecs.encode(*keys_values, handle), returned)

    def decode() -> None:
        forget(*arrived)
        torch.autograd.backward(codecs.decoders([0])[0](arrived, torch.float32), back)

    return {"encode": encode, "decode": decode}


def forget(*tensors: Tensor) -> None:
    """Drop gradients: adding to what is there is not what a step does."""
    for tensor in tensors:
        tensor.grad = None


def figures(config: Config, tokens: int, timed: dict[str, list[float]]) -> dict[str, object]:
    """Medians in seconds over all layers, and the ratios."""
    layers, compressed = config.model.layers, len(config.compressed)
    ranks, layer = rank_table(config.model, config.compress).ranks, config.compressed[0]

    def share(encodes: int, decodes: int) -> float:
        turns = zip(timed["encode"], timed["decode"], timed["layer"], strict=True)
        return statistics.median(
            compressed * (encodes * encode + decodes * decode) / (layers * step) for encode, decode, step in turns
        )

    return {
        "benchmark": "codec cost",
        "tokens": tokens,
        "d_model": config.model.d_model,
        "d_kv": config.model.d_kv,
        "ranks": [ranks[layer, "k"], ranks[layer, "v"]],
        "rotation": config.compress.rotation,
        "layers": layers,
        "compressed_layers": compressed,
        "turns": len(timed["layer"]),
        "threads": torch.get_num_threads(),
        "step_s": layers * statistics.median(timed["layer"]),
        "encode_s": compressed * statistics.median(timed["encode"]),
        "decode_s": compressed * statistics.median(timed["decode"]),
        "encode_share": share(1, 0),
        "decode_share": share(0, 1),
        "share": share(1, 1),
        "chunks": config.model.chunks,
        "last_node_share": share(1, config.model.chunks - 1),
        "target": TARGET,
        "host": host_line(),
    }


def table(result: dict[str, object]) -> str:
    """The same as Markdown."""
    lines = [
        f"{result['tokens']} tokens, d = {result['d_model']}, d_kv = {result['d_kv']}, ranks of K and V "
        f"{result['ranks']}, {result['compressed_layers']} of {result['layers']} layers compressed, "
        f"{result['rotation']}; {result['host']}, {result['threads']} thread(s), median of {result['turns']} turns.",
        "",
        "| forward and backward, all layers | CPU seconds | of a local step |",
        "|---|---|---|",
        f"| local step | {result['step_s']:.2f} | |",
        f"| encode the own chunk | {result['encode_s']:.3f} | {result['encode_share']:.2%} |",
        f"| decode one chunk | {result['decode_s']:.3f} | {result['decode_share']:.2%} |",
        f"| both | | **{result['share']:.2%}** (target: under {result['target']:.0%}) |",
        f"| last of {result['chunks']} nodes: encode, and decode all before it | | {result['last_node_share']:.1%} |",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
