"""A Llama-3 decoder: RMSNorm, RoPE, SwiGLU, grouped-query attention.

Parameter names are those of `transformers`' LlamaForCausalLM, so that weights go over by name. This file is a plain
Llama and knows of no chunks and no network; `node.model.exchanged` puts an attention over exchanged chunks in the place
of the plain one.

Shapes: B batch, n tokens, d width, H query heads, G key/value heads, D head_dim, K = G·D; `...` is any leading
dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from node.config import ModelConfig
from node.config.seeds import derive
from node.model.rope import Rope


@dataclass(frozen=True)
class Step:
    """What the layers share in one pass: where the tokens stand in the context, [..., n], and the rotary embedding."""

    rope: Rope
    positions: Tensor


class RMSNorm(nn.Module):
    """x / rms(x) · weight, computed in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self._eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self._eps).to(x.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.head_dim = model.head_size
        self._kv_heads = model.kv_heads
        self.q_proj = nn.Linear(model.d_model, model.heads * model.head_size, bias=False)
        self.k_proj = nn.Linear(model.d_model, model.d_kv, bias=False)
        self.v_proj = nn.Linear(model.d_model, model.d_kv, bias=False)
        self.o_proj = nn.Linear(model.heads * model.head_size, model.d_model, bias=False)

    def forward(self, x_Bnd: Tensor, step: Step) -> Tensor:
        q_BnHD = step.rope(self.q_proj(x_Bnd).unflatten(-1, (-1, self.head_dim)), step.positions)
        k_BGnD, v_BGnD = self.heads(self.k_proj(x_Bnd), self.v_proj(x_Bnd), step.positions, step.rope)
        out_BHnD = F.scaled_dot_product_attention(
            q_BnHD.transpose(-3, -2), k_BGnD, v_BGnD, is_causal=True, enable_gqa=True
        )
        return self.o_proj(out_BHnD.transpose(-3, -2).flatten(-2))  # type: ignore[no-any-return]

    def heads(self, k_nK: Tensor, v_nK: Tensor, positions: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """Keys (turned by RoPE) and values by head, [..., G, n, D], from flat ones [..., n, K]."""
        k_nGD = rope(k_nK.unflatten(-1, (self._kv_heads, self.head_dim)), positions)
        v_nGD = v_nK.unflatten(-1, (self._kv_heads, self.head_dim))
        return k_nGD.transpose(-3, -2), v_nGD.transpose(-3, -2)


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

    def __init__(self, model: ModelConfig, attention: Attention) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(model.d_model, model.norm_eps)
        self.self_attn = attention
        self.post_attention_layernorm = RMSNorm(model.d_model, model.norm_eps)
        self.mlp = FeedForward(model)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        return self.after_attention(x, self.self_attn(self.input_layernorm(x), step))

    def after_attention(self, x: Tensor, attended: Tensor) -> Tensor:
        """What follows the attention, which gave `attended` for the residual stream `x`."""
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x))  # type: ignore[no-any-return]


class Llama(nn.Module):
    """The decoder. Weights are drawn from `seed`; `attention` makes each layer's attention."""

    layer_type: type[Layer] = Layer

    def __init__(
        self, model: ModelConfig, vocab_size: int, seed: int, attention: Callable[[int], Attention] | None = None
    ) -> None:
        super().__init__()
        self._model = model
        self._rope: Rope | None = None
        self.embed_tokens = nn.Embedding(vocab_size, model.d_model)
        self.layers = nn.ModuleList(
            self.layer_type(model, attention(index) if attention else Attention(model)) for index in range(model.layers)
        )
        self.norm = RMSNorm(model.d_model, model.norm_eps)
        self.lm_head = nn.Linear(model.d_model, vocab_size, bias=False)
        self._initialise(seed)
        if model.tied:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, tokens: Tensor, step: Step) -> Tensor:
        """Logits [..., n, vocab] of tokens [..., n]."""
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, step)
        return self.lm_head(self.norm(x))  # type: ignore[no-any-return]

    def rope(self, device: torch.device) -> Rope:
        """The rotary embedding of a whole context, made once."""
        if self._rope is None:
            model = self._model
            self._rope = Rope(model.head_size, model.context, model.rope_theta, device, model.rope_scaling)
        return self._rope

    def _initialise(self, seed: int) -> None:
        """Normal weights of std 0.02, those that write to the residual stream scaled down by √(2·layers) (GPT-2)."""
        residual = 0.02 / math.sqrt(2 * self._model.layers)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                source = torch.Generator().manual_seed(derive(seed, "weights", name))
                std = residual if name.endswith(("o_proj", "down_proj")) else 0.02
                nn.init.normal_(module.weight, std=std, generator=source)
