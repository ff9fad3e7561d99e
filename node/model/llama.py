"""A Llama-3 decoder (RMSNorm, RoPE, SwiGLU, grouped-query attention) over the chunks that this node owns.

Parameter names are those of `transformers`' LlamaForCausalLM, so that weights go over by name; only what
the compression learns has no place there. The model is one function of the tokens: which node owns which chunk is the
exchange's business (`node.exchange.chunks`).

Shapes: C own chunks, B batch, n tokens of a chunk, d width, H query heads, G key/value heads, D head_dim, K = G·D.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from node.config import CompressConfig, Config, ModelConfig
from node.config.seeds import derive
from node.exchange.chunks import ChunkExchange
from node.exchange.passes import PassSpec
from node.exchange.payload import Payload
from node.model.attention import ChunkAttention
from node.model.rope import Rope
from node.subspace.basis import group_moments
from node.subspace.codec import Codec, CodecShape
from node.subspace.energy import EnergyReport
from node.subspace.learned import LearnedCodec
from node.subspace.ranks import LayerShapes, codec_shapes, rotation_of

Moments = dict[tuple[int, str], Tensor]
Decoders = tuple[Tensor | None, Tensor | None]
"""Of K and of V, for one use."""

_OWN, _LOCAL, _FAR = 0, 1, 2
"""Uses of a layer's decoders: each chunk of itself, own chunks of each other, and from here on those of other nodes."""


@dataclass
class Pass:
    """What one pass over the model shares among its layers."""

    exchange: ChunkExchange
    spec: PassSpec
    rope: Rope
    own_positions_C1n: Tensor
    moments: Moments | None = field(default=None)  # filled by `Llama.forward` where a caller asks for them
    report: EnergyReport | None = field(default=None)  # likewise


class RMSNorm(nn.Module):
    """x / rms(x) · weight, computed in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self._eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self._eps).to(x.dtype)


class KeyValueCodecs(nn.Module):
    """The codecs of one layer's K and V; the payload is K's tensors, then V's."""

    def __init__(self, config: Config, layer: int, shapes: LayerShapes) -> None:
        super().__init__()
        compress = config.compress
        self._layer, self._hands_on = layer, config.hands_theta_on
        source = "first" if compress.theta == "first" else "mean"

        def codec(kind: str, shape: CodecShape) -> Codec:
            stream = derive(config.run.seed, "rotation", layer, kind)
            made = LearnedCodec if compress.subspace == "learned" else Codec
            return made(shape, rotation_of(compress, stream), compress.clip, stream, source)

        self.k, self.v = codec("k", shapes.k), codec("v", shapes.v)

    def encode(self, k_CBnK: Tensor, v_CBnK: Tensor, exchange: ChunkExchange) -> Payload:
        """The payload of the own chunks; θ of each from itself, or handed on from the chunk before."""
        k_CBnGD, v_CBnGD = self.k.grouped(k_CBnK), self.v.grouped(v_CBnK)
        thetas = self.k.theta(k_CBnGD, exchange.own), self.v.theta(v_CBnGD, exchange.own)
        if self._hands_on:
            handed = exchange.hand_on(self._layer, torch.cat(thetas, dim=-1))
            k_theta, v_theta = handed.split([theta.shape[-1] for theta in thetas], dim=-1)
        else:
            k_theta, v_theta = thetas
        return self.k.compress(k_CBnGD, k_theta) + self.v.compress(v_CBnGD, v_theta)

    def report(self, report: EnergyReport, k_CBnK: Tensor, v_CBnK: Tensor, payload: Payload) -> None:
        half = len(payload) // 2
        report.see(self._layer, "k", k_CBnK, self.k, payload[:half])
        report.see(self._layer, "v", v_CBnK, self.v, payload[half:])

    def decoders(self, uses: int) -> list[Decoders]:
        """What `decode` takes for each of so many uses (`Codec.decoders`)."""
        return list(zip(self.k.decoders(uses), self.v.decoders(uses), strict=True))

    def decode(self, payload: Payload, dtype: torch.dtype, decoders: Decoders = (None, None)) -> tuple[Tensor, Tensor]:
        half, (k, v) = len(payload) // 2, decoders
        return self.k.decode(payload[:half], dtype, k), self.v.decode(payload[half:], dtype, v)


class Attention(nn.Module):
    """Grouped-query attention: within a chunk (as `compress.own` says), and over exchanged payloads to earlier ones."""

    def __init__(self, config: Config, layer: int, shapes: LayerShapes | None) -> None:
        super().__init__()
        model = config.model
        self._layer, self._head_dim, self._d_kv = layer, model.head_size, model.d_kv
        self._groups, self._kv_heads = model.heads // model.kv_heads, model.kv_heads
        self._moment_groups = model.kv_heads if config.compress.scope == "head" else 1
        self.q_proj = nn.Linear(model.d_model, model.heads * model.head_size, bias=False)
        self.k_proj = nn.Linear(model.d_model, model.d_kv, bias=False)
        self.v_proj = nn.Linear(model.d_model, model.d_kv, bias=False)
        self.o_proj = nn.Linear(model.heads * model.head_size, model.d_model, bias=False)
        self.codecs = KeyValueCodecs(config, layer, shapes) if shapes else None
        self._projects_own = config.compress.own == "projected"

    def forward(self, x_CBnd: Tensor, step: Pass) -> Tensor:
        exchange = step.exchange
        k_CBnK, v_CBnK = self.k_proj(x_CBnd), self.v_proj(x_CBnd)
        if step.moments is not None and self.codecs is not None:
            for kind, z_CBnK in (("k", k_CBnK), ("v", v_CBnK)):
                step.moments[self._layer, kind] = group_moments(z_CBnK.detach().float(), self._moment_groups)
        compresses = step.spec.compressed and self.codecs is not None
        far = {chunk: exchange.first_reader(chunk) for chunk in exchange.earlier(self._layer)}
        decoders = self._decoders(_FAR + len(far), compresses)
        payload = self._encode(k_CBnK, v_CBnK, step)
        if step.report is not None:
            self._report(step.report, k_CBnK, v_CBnK, payload if compresses else None)
        if compresses and self._projects_own:
            # Of what was encoded, not of what crosses: nothing of this leaves the node, or is rounded.
            k_CBnK, v_CBnK = self._decode_own(payload, k_CBnK.dtype, decoders[_OWN])
        anchor, payload = exchange.publish(self._layer, payload)
        if compresses and self.codecs is not None:
            anchor = self.codecs.v.tie(self.codecs.k.tie(anchor))
        # What follows needs no network: it runs while the payloads travel, and in the backward after all is sent.
        q_CBnHD = self.q_proj(x_CBnd).unflatten(-1, (-1, self._head_dim))
        q_CBHnD = step.rope(q_CBnHD, step.own_positions_C1n).transpose(-3, -2)
        shared = bool(exchange.shared(self._layer))
        attention = ChunkAttention(q_CBHnD, far, local=shared)
        attention.attend_own(*self._heads(k_CBnK, v_CBnK, step.own_positions_C1n, step.rope), anchor)
        if shared:
            k_CBnK, v_CBnK = self._decode_own(tuple(tensor[:-1] for tensor in payload), k_CBnK.dtype, decoders[_LOCAL])
            attention.attend_local(*self._heads(k_CBnK, v_CBnK, step.own_positions_C1n[:-1], step.rope))
        for chunk, arrived in exchange.arrivals(self._layer, anchor):
            use = _FAR + list(far).index(chunk)
            k_BnK, v_BnK = self._decode(arrived, k_CBnK.dtype, decoders[use])
            positions_n = step.own_positions_C1n[0, 0] + (chunk - exchange.own[0]) * step.spec.tokens
            attention.attend_far(chunk, *self._heads(k_BnK, v_BnK, positions_n, step.rope))
        return self.o_proj(attention.merge().transpose(-3, -2).flatten(-2))  # type: ignore[no-any-return]

    def _heads(self, k_nK: Tensor, v_nK: Tensor, positions: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """Keys (turned by RoPE) and values of all query heads, [..., H, n, D], from flat ones [..., n, K]."""
        k_nGD = rope(k_nK.unflatten(-1, (self._kv_heads, self._head_dim)), positions)
        v_nGD = v_nK.unflatten(-1, (self._kv_heads, self._head_dim))
        k_HnD, v_HnD = k_nGD.transpose(-3, -2), v_nGD.transpose(-3, -2)
        if self._groups == 1:
            return k_HnD, v_HnD
        return k_HnD.repeat_interleave(self._groups, -3), v_HnD.repeat_interleave(self._groups, -3)

    def _encode(self, k_CBnK: Tensor, v_CBnK: Tensor, step: Pass) -> Payload:
        if step.spec.compressed and self.codecs is not None:
            return self.codecs.encode(k_CBnK, v_CBnK, step.exchange)
        return k_CBnK, v_CBnK

    def _report(self, report: EnergyReport, k_CBnK: Tensor, v_CBnK: Tensor, payload: Payload | None) -> None:
        if self.codecs is not None and payload is not None:
            self.codecs.report(report, k_CBnK, v_CBnK, payload)
        else:
            report.see(self._layer, "k", k_CBnK)
            report.see(self._layer, "v", v_CBnK)

    def _decoders(self, uses: int, compresses: bool) -> Sequence[Decoders | None]:
        return self.codecs.decoders(uses) if compresses and self.codecs is not None else [None] * uses

    def _decode(self, payload: Payload, dtype: torch.dtype, decoders: Decoders | None) -> tuple[Tensor, Tensor]:
        """What a payload gives back; without `decoders` it is whole."""
        if decoders is not None and self.codecs is not None:
            return self.codecs.decode(payload, dtype, decoders)
        k, v = payload
        return k.to(dtype), v.to(dtype)

    def _decode_own(self, payload_CB: Payload, dtype: torch.dtype, decoders: Decoders | None) -> tuple[Tensor, Tensor]:
        """K and V [C, B, n, K] of own chunks as their payload gives them back."""
        shape = payload_CB[0].shape[:2]
        k, v = self._decode(tuple(tensor.flatten(0, 1) for tensor in payload_CB), dtype, decoders)
        return k.unflatten(0, shape), v.unflatten(0, shape)


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x))."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(model.d_model, model.ffn_dim, bias=False)
        self.up_proj = nn.Linear(model.d_model, model.ffn_dim, bias=False)
        self.down_proj = nn.Linear(model.ffn_dim, model.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class Layer(nn.Module):
    """One decoder layer: attention and feed-forward, each after a norm and around a residual."""

    def __init__(self, config: Config, layer: int, shapes: LayerShapes | None) -> None:
        super().__init__()
        model = config.model
        self.input_layernorm = RMSNorm(model.d_model, model.norm_eps)
        self.self_attn = Attention(config, layer, shapes)
        self.post_attention_layernorm = RMSNorm(model.d_model, model.norm_eps)
        self.mlp = FeedForward(model)

    def forward(self, x_CBnd: Tensor, step: Pass) -> Tensor:
        x_CBnd = x_CBnd + self.self_attn(self.input_layernorm(x_CBnd), step)
        return x_CBnd + self.mlp(self.post_attention_layernorm(x_CBnd))  # type: ignore[no-any-return]


class Llama(nn.Module):
    """The decoder. Weights are drawn from `run.seed`, the same on every node."""

    def __init__(self, config: Config, vocab_size: int) -> None:
        super().__init__()
        model = config.model
        shapes = codec_shapes(config)
        self._model = model
        self.embed_tokens = nn.Embedding(vocab_size, model.d_model)
        self.layers = nn.ModuleList(Layer(config, index, shapes.get(index)) for index in range(model.layers))
        self.norm = RMSNorm(model.d_model, model.norm_eps)
        self.lm_head = nn.Linear(model.d_model, vocab_size, bias=False)
        self._initialise(config.run.seed)
        if model.tied:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(
        self,
        tokens_CBn: Tensor,
        exchange: ChunkExchange,
        spec: PassSpec,
        moments: Moments | None = None,
        report: EnergyReport | None = None,
    ) -> Tensor:
        """Logits [C, B, n, vocab] of the own chunks' tokens. `moments`, if given, receives ΣzᵀZ of K and V by layer;
        `report`, in a pass without gradients, what the subspaces keep."""
        trains = torch.is_grad_enabled()
        exchange.begin(spec, trains)
        step = Pass(
            exchange, spec, self._rope(tokens_CBn.device), self._positions(tokens_CBn, exchange), moments, report
        )
        x_CBnd = self.embed_tokens(tokens_CBn)
        for layer in self.layers:
            x_CBnd = layer(x_CBnd, step)
        if not trains:
            exchange.finish_forward()
        return self.lm_head(self.norm(x_CBnd))  # type: ignore[no-any-return]

    def codecs(self) -> Iterator[tuple[tuple[int, str], Codec]]:
        """((layer, "k" or "v"), codec) of every compressed layer, in order."""
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, Layer)
            if layer.self_attn.codecs is not None:
                yield (index, "k"), layer.self_attn.codecs.k
                yield (index, "v"), layer.self_attn.codecs.v

    def weight_moments(self, compress: CompressConfig) -> Moments:
        """WᵀW of the projections that make K and V (Z = XW), by layer: the paper's source of the basis."""
        groups = self._model.kv_heads if compress.scope == "head" else 1
        moments: Moments = {}
        for (index, kind), _ in self.codecs():
            projection = self.get_submodule(f"layers.{index}.self_attn.{kind}_proj")
            assert isinstance(projection, nn.Linear)
            moments[index, kind] = group_moments(projection.weight.detach().float().mT, groups)
        return moments

    def _positions(self, tokens_CBn: Tensor, exchange: ChunkExchange) -> Tensor:
        tokens = tokens_CBn.shape[-1]
        starts_C = torch.tensor(exchange.own, device=tokens_CBn.device) * tokens
        within_n = torch.arange(tokens, device=tokens_CBn.device)
        return (starts_C[:, None] + within_n)[:, None]

    def _rope(self, device: torch.device) -> Rope:
        if self._rope_tables is None:
            model = self._model
            self._rope_tables = Rope(model.head_size, model.context, model.rope_theta, device)
        return self._rope_tables

    _rope_tables: Rope | None = None

    def _initialise(self, seed: int) -> None:
        """Normal weights of std 0.02, those that write to the residual stream scaled down by √(2·layers) (GPT-2)."""
        residual = 0.02 / math.sqrt(2 * self._model.layers)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                source = torch.Generator().manual_seed(derive(seed, "weights", name))
                std = residual if name.endswith(("o_proj", "down_proj")) else 0.02
                nn.init.normal_(module.weight, std=std, generator=source)
