"""What makes a plain Llama's attention an exchanged one: over the chunks that this node owns, and those that arrive.

Within a chunk the queries meet its own keys and values (`compress.own` says whether as they are or as the subspace
keeps them), and over exchanged payloads those of earlier chunks. The model is one function of the tokens; which node
owns which chunk is the exchange's business (`node.exchange.chunks`), and the blocks of attention are those of
`node.model.attention`.

Shapes: C own chunks, B batch, n tokens of a chunk, d width, H query heads, G key/value heads, D head_dim, K = G·D.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from node.config import CompressConfig, ModelConfig, RunConfig
from node.exchange.chunks import Pass, Replay
from node.exchange.payload import Payload
from node.measure.spans import DECODE, ENCODE
from node.model.attention import LOCAL, OWN, ChunkAttention, Merged
from node.model.key_value import Decode, KeyValueCodecs, Probe, Whole, key_value_codecs
from node.model.llama import Attention, Layer, Llama, Step
from node.model.recompute import Forgotten
from node.model.rectangles import Grid, Rectangles, far_rectangles, local_rectangles, own_squares
from node.model.turns import in_turns
from node.subspace.codec import Codec, Key
from node.subspace.ranks import RankTable, rank_table

T = TypeVar("T")


@dataclass(frozen=True)
class ChunkStep(Step):
    """One pass over the own chunks. `probe`, if there is one, sees what the subspaces keep. `grid` keeps attention
    within documents."""

    handle: Pass
    probe: Probe | None = None
    grid: Grid | None = None


@dataclass
class _Again:
    """What is kept of one layer where its activations are not: with what arrived, which the pass keeps, enough to
    compute them again without the network, and without the kernels of attention."""

    layer: Layer
    index: int
    x_CBnd: Tensor
    step: ChunkStep
    merged: Merged

    def __call__(self) -> None:
        attention = self.layer.self_attn
        assert isinstance(attention, ExchangedAttention)
        step = replace(self.step, handle=Replay(self.step.handle, self.index), probe=None)
        begun = attention.begin(self.layer.input_layernorm(self.x_CBnd), step, self.merged)
        self.layer.after_attention(self.x_CBnd, attention.finish(begun, step))


class _Begun(NamedTuple):
    """A layer's attention between sending its payloads and receiving those of others."""

    attention: ChunkAttention
    anchor: Tensor
    decode: Mapping[int, Decode]
    dtype: torch.dtype


class ExchangedAttention(Attention):
    """Grouped-query attention within a chunk, and over exchanged payloads to earlier ones.

    `begin` does all that needs no network, first of all to send; `finish` waits for payloads. A caller with several
    passes in flight does other work in between.
    """

    def __init__(self, model: ModelConfig, layer: int, codecs: KeyValueCodecs | None, projects_own: bool) -> None:
        super().__init__(model)
        self._layer, self._projects_own = layer, projects_own
        self._whole = Whole(layer)
        self.codecs = codecs

    def forward(self, x_CBnd: Tensor, step: Step) -> Tensor:
        assert isinstance(step, ChunkStep)
        return self.finish(self.begin(x_CBnd, step, Merged()), step)

    def begin(self, x_CBnd: Tensor, step: ChunkStep, merged: Merged) -> _Begun:
        """Send the own chunks' keys and values to their readers, and attend to the own chunks.

        `merged` takes the attention's result, or has it where the layer is computed again.
        """
        exchange, layer = step.handle.exchange, self._layer
        compresses = self.codecs is not None and step.handle.spec.compressed
        codecs = self.codecs if self.codecs is not None and compresses else self._whole
        k_CBnK, v_CBnK = self.k_proj(x_CBnd), self.v_proj(x_CBnd)
        earlier = step.handle.earlier(layer)
        decode = codecs.decoders([OWN, LOCAL, *earlier])
        with step.handle.span(ENCODE, layer):
            payload = codecs.encode(k_CBnK, v_CBnK, step.handle)
        if step.probe is not None:
            codecs.show(step.probe, k_CBnK, v_CBnK, payload)
        dtype = k_CBnK.dtype
        if compresses and self._projects_own:
            # This is made of what was encoded, not of what crosses: it does not leave the node and is not rounded.
            with step.handle.span(DECODE, layer):
                k_CBnK, v_CBnK = _decode_own(payload, dtype, decode[OWN])
        anchor, payload = step.handle.publish(layer, payload)
        anchor = codecs.tie(anchor)
        # What follows needs no network: it runs while the payloads travel, and in the backward after all is sent.
        q_CBnHD = self.q_proj(x_CBnd).unflatten(-1, (-1, self.head_dim))
        q_CBHnD = step.rope(q_CBnHD, step.positions).transpose(-3, -2)
        far = {chunk: exchange.first_reader(chunk) for chunk in earlier}
        shared = bool(exchange.shared(layer))
        attention = ChunkAttention(q_CBHnD, far, local=shared, merged=merged, grid=step.grid)
        attention.attend_own(*self.heads(k_CBnK, v_CBnK, step.positions, step.rope), anchor)
        if shared:
            with step.handle.span(DECODE, layer):
                k_CBnK, v_CBnK = _decode_own(tuple(tensor[:-1] for tensor in payload), dtype, decode[LOCAL])
            attention.attend_local(*self.heads(k_CBnK, v_CBnK, step.positions[:-1], step.rope))
        return _Begun(attention, anchor, decode, dtype)

    def finish(self, begun: _Begun, step: ChunkStep) -> Tensor:
        """Attend to the chunks of other nodes as they arrive, and merge: the attention's output [C, B, n, d]."""
        exchange = step.handle.exchange
        for chunk, arrived in step.handle.arrivals(self._layer, begun.anchor):
            with step.handle.span(DECODE, self._layer):
                k_BnK, v_BnK = begun.decode[chunk](arrived, begun.dtype)
            positions_n = step.positions[0, 0] + (chunk - exchange.own[0]) * step.handle.spec.tokens
            begun.attention.attend_far(chunk, *self.heads(k_BnK, v_BnK, positions_n, step.rope))
        merged_CBHnD = begun.attention.merge()
        return self.o_proj(merged_CBHnD.transpose(-3, -2).flatten(-2))  # type: ignore[no-any-return]


def _decode_own(payload_CB: Payload, dtype: torch.dtype, decode: Decode) -> tuple[Tensor, Tensor]:
    """K and V [C, B, n, K] of own chunks as their payload gives them back."""
    shape = payload_CB[0].shape[:2]
    k, v = decode(tuple(tensor.flatten(0, 1) for tensor in payload_CB), dtype)
    return k.unflatten(0, shape), v.unflatten(0, shape)


def _grid(handle: Pass, batch: int) -> Grid:
    """The rectangles of all blocks of attention, the same in every layer. Positions count from the start of the
    context: RoPE turns queries and keys by their distance alone, so documents need no positions of their own."""
    documents, exchange = handle.documents, handle.exchange
    assert documents is not None
    own = exchange.own
    grid: dict[int, Rectangles] = {
        OWN: own_squares(documents, own, batch),
        LOCAL: local_rectangles(documents, own, batch),
    }
    for chunk in handle.earlier(exchange.payload.layers - 1):
        grid[chunk] = far_rectangles(documents, chunk, own[exchange.first_reader(chunk) :])
    return grid


class ExchangedLayer(Layer):
    """A layer whose attention is exchanged. `number` is its place among the layers."""

    number: int

    def through(self, x_CBnd: Tensor, step: ChunkStep, forgets: bool) -> Generator[None, None, Tensor]:
        """This layer of one pass, in two steps: the yield is a time at which payloads travel. With `forgets` its
        activations are computed again in the backward."""
        attention = self.self_attn
        assert isinstance(attention, ExchangedAttention)
        merged = Merged()
        saving: Callable[[], AbstractContextManager[object]] = nullcontext
        if forgets:
            step.handle.keep(self.number)
            x = x_CBnd.detach().requires_grad_(x_CBnd.requires_grad)
            saving = Forgotten(_Again(self, self.number, x, step, merged), x.device.type).saving
        with saving():
            begun = attention.begin(self.input_layernorm(x_CBnd), step, merged)
        yield
        with saving():
            return self.after_attention(x_CBnd, attention.finish(begun, step))

    def together(self, x_CBnd: Sequence[Tensor], steps: Sequence[ChunkStep], forgets: bool) -> list[Tensor]:
        """This layer of several passes, which take turns. Where the model is sharded, this is the layer's forward."""
        return in_turns([self.through(x, step, forgets) for x, step in zip(x_CBnd, steps, strict=True)])


class ExchangedLlama(Llama):
    """The model that a config describes, over exchanged chunks. Weights are drawn from `run.seed`, the same on every
    node. Its codecs read their ranks from `ranks`; without it, from the table that the config gives."""

    layer_type = ExchangedLayer
    sharded = False
    """Whether each process of a site holds only its shard of the weights (`node.site.sharding`)."""
    has_run = False
    """Whether `whole` has been called."""

    def __init__(
        self,
        model: ModelConfig,
        compress: CompressConfig,
        run: RunConfig,
        vocab_size: int,
        ranks: RankTable | None = None,
    ) -> None:
        table = rank_table(model, compress) if ranks is None else ranks
        projects_own = compress.own == "projected"

        def attention(layer: int) -> ExchangedAttention:
            codecs = key_value_codecs(compress, run.seed, table, layer) if layer in table.layers else None
            return ExchangedAttention(model, layer, codecs, projects_own)

        super().__init__(model, vocab_size, run.seed, attention)
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, ExchangedLayer)
            layer.number = index
        self.ranks = table
        self._recompute = run.recompute

    def hidden(self, tokens_CBn: Tensor, handle: Pass, probe: Probe | None = None) -> Tensor:
        """What the output head reads of the own chunks' tokens, [C, B, n, d]."""
        steps = self.overlapped(tokens_CBn, handle, probe)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                hidden_CBnd: Tensor = end.value
                return hidden_CBnd

    def overlapped(self, tokens_CBn: Tensor, handle: Pass, probe: Probe | None = None) -> Generator[None, None, Tensor]:
        """`hidden` in steps: each yield is a time at which payloads travel and other work is welcome.

        Autograd goes backwards through what it has recorded in the reverse order, so that passes which took turns in
        the forward take turns in one common backward too.
        """
        x_CBnd = self.embed_tokens(tokens_CBn)
        step = self._step(tokens_CBn, handle, probe)
        for layer in self.layers:
            assert isinstance(layer, ExchangedLayer)
            x_CBnd = yield from layer.through(x_CBnd, step, self._forgets)
        return self.norm(x_CBnd)  # type: ignore[no-any-return]

    def hidden_together(self, passes: Sequence[tuple[Tensor, Pass]], probe: Probe | None = None) -> list[Tensor]:
        """`hidden` of several passes, given as (tokens [C, B, n], handle), one layer of all after another."""
        x_CBnd = [self.embed_tokens(tokens_CBn) for tokens_CBn, _ in passes]
        steps = [self._step(tokens_CBn, handle, probe) for tokens_CBn, handle in passes]
        for layer in self.layers:
            assert isinstance(layer, ExchangedLayer)
            x_CBnd = layer.together(x_CBnd, steps, self._forgets)
        return [self.norm(x) for x in x_CBnd]

    def whole(self, work: Callable[[], T]) -> T:
        """Call `work`, for which embedding, last norm and head are there whole. Layers are gathered one by one."""
        self.has_run = True
        return work()

    @property
    def _forgets(self) -> bool:
        return self._recompute and torch.is_grad_enabled()

    def logits(self, tokens_CBn: Tensor, handle: Pass, probe: Probe | None = None) -> Tensor:
        """Logits [C, B, n, vocab] of the own chunks' tokens."""
        return self.lm_head(self.hidden(tokens_CBn, handle, probe))  # type: ignore[no-any-return]

    def _step(self, tokens_CBn: Tensor, handle: Pass, probe: Probe | None) -> ChunkStep:
        device, tokens = tokens_CBn.device, tokens_CBn.shape[-1]
        starts_C = torch.tensor(handle.exchange.own, device=device) * tokens
        positions_C1n = (starts_C[:, None] + torch.arange(tokens, device=device))[:, None]
        grid = None if handle.documents is None else _grid(handle, tokens_CBn.shape[1])
        return ChunkStep(self.rope(device), positions_C1n, handle, probe, grid)

    def codecs(self) -> Iterator[tuple[Key, Codec]]:
        """((layer, "k" or "v"), codec) of every compressed layer, in order."""
        for index, layer in enumerate(self.layers):
            codecs = layer.get_submodule("self_attn").codecs
            if isinstance(codecs, KeyValueCodecs):
                yield (index, "k"), codecs.k
                yield (index, "v"), codecs.v
