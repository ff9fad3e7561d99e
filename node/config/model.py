"""[model]: the shape of the decoder, and how many chunks its context has."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from netem.config import Section
from netem.errors import ConfigError


class RopeScaling(Section, frozen=True, kw_only=True):
    """[model.rope_scaling]: Llama-3.1's stretching of RoPE's slow turns over a longer context."""

    factor: Annotated[
        float, Meta(description="How many times longer the slowest turns become. 1: RoPE is not scaled.", ge=1)
    ] = 1.0
    low_freq_factor: Annotated[
        float,
        Meta(description="Turns longer than original_context / low_freq_factor are scaled in full.", gt=0),
    ] = 1.0
    high_freq_factor: Annotated[
        float, Meta(description="Turns shorter than original_context / high_freq_factor stay as they are.", gt=0)
    ] = 4.0
    original_context: Annotated[
        int, Meta(description="Tokens of the context for which the model was trained before.", ge=1)
    ] = 8192

    def check(self, path: str) -> None:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ConfigError(
                f"{path}high_freq_factor = {self.high_freq_factor}: expected more than {path}low_freq_factor = "
                f"{self.low_freq_factor}"
            )


class ModelConfig(Section, frozen=True, kw_only=True):
    """[model]: a Llama-3 decoder over a context that is cut into equal chunks."""

    init: Annotated[
        str,
        Meta(
            description="Hugging Face folder of a Llama from whose weights the run starts; the shape is then that of "
            "its config.json. Empty: weights are drawn from run.seed."
        ),
    ] = ""
    layers: Annotated[int, Meta(description="Number of decoder layers.", ge=1)] = 4
    d_model: Annotated[int, Meta(description="Width of the residual stream.", ge=8)] = 128
    heads: Annotated[int, Meta(description="Number of query heads.", ge=1)] = 4
    kv_heads: Annotated[int, Meta(description="Number of key and value heads (grouped-query attention).", ge=1)] = 4
    head_dim: Annotated[int, Meta(description="Width of one head. 0: d_model / heads.", ge=0)] = 0
    ffn_dim: Annotated[int, Meta(description="Inner width of the feed-forward block (SwiGLU).", ge=8)] = 384
    context: Annotated[int, Meta(description="Tokens in one context (T).", ge=2)] = 1024
    chunks: Annotated[
        int, Meta(description="Number of equal parts of the context (C). Each node owns one or more of them.", ge=1)
    ] = 4
    rope_theta: Annotated[float, Meta(description="Base of the rotary position embedding (RoPE).", gt=0)] = 500_000.0
    rope_scaling: RopeScaling = RopeScaling()
    norm_eps: Annotated[float, Meta(description="Epsilon of RMSNorm.", gt=0)] = 1e-5
    tied: Annotated[bool, Meta(description="Whether the output head uses the weights of the token embedding.")] = True

    def check(self, path: str) -> None:
        if self.context % self.chunks:
            lower = max(self.context // self.chunks, 1) * self.chunks
            raise ConfigError(
                f"{path}context = {self.context}: does not divide into {path}chunks = {self.chunks} equal parts; "
                f"{lower} or {lower + self.chunks} would"
            )
        if self.heads % self.kv_heads:
            raise ConfigError(f"{path}heads = {self.heads}: expected a multiple of {path}kv_heads = {self.kv_heads}")
        if not self.head_dim and self.d_model % self.heads:
            raise ConfigError(
                f"{path}d_model = {self.d_model}: expected a multiple of {path}heads = {self.heads}, "
                f"or {path}head_dim set"
            )
        if self.head_size % 2:
            raise ConfigError(f"{path}head_dim = {self.head_size}: expected an even number (RoPE turns pairs)")

    @property
    def head_size(self) -> int:
        """head_dim, with its default filled in."""
        return self.head_dim or self.d_model // self.heads

    @property
    def d_kv(self) -> int:
        """Width of K, and of V, over all heads."""
        return self.kv_heads * self.head_size

    @property
    def chunk_tokens(self) -> int:
        """Tokens in one chunk (n = T / C)."""
        return self.context // self.chunks
