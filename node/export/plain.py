"""Which trained models are a plain Llama, and the weights that make it one.

A model is plain where every token attends to K and V as the layer's two matrices make them: uncompressed from the
start, or unplugged. One that still compresses is plain only where all tokens see every chunk, their own too, through
one and the same projection: z̃ = z ŪŪᵀ with z = Wx is W̃ = ŪŪᵀW, for K too, since RoPE comes after it. Everything else
is refused, with the reason: what `transformers` would compute of it is another function of the tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from coordinator.records.folder import CONFIG
from netem.errors import ConfigError
from node.config import Config
from node.exchange.payload import formats_of
from node.model.exchanged import ExchangedLlama
from node.model.hf import to_hf
from node.subspace.codec import Codec

UNPLUGGED_SHARE = 0.1
"""Steps without compression that a refusal proposes, as a share of those of the run."""

ROUNDING = ("bfloat16", "int8", "fp8")
"""Formats that round what other chunks see, but little: the exported model, which does not round, is close to it."""


def compresses(config: Config, step: int) -> bool:
    """Whether K and V of a checkpoint after `step` steps go through subspaces."""
    meets_it = config.model.chunks > 1 or config.compress.own == "projected"
    return config.compress.compresses and meets_it and not config.compress.is_unplugged_at(step)


def check_plain(config: Config, step: int) -> None:
    """Raise `ConfigError`, with the reason and the mend, where a checkpoint after `step` steps is no plain Llama."""
    warm_start = config.compress.warm_start_steps
    if step <= warm_start:
        saw = config.model.chunks * config.compress.warm_start_tokens(config.model.chunk_tokens)
        raise ConfigError(
            f"step {step}: lies in the warm start (compress.warmup_steps = {warm_start}), which saw "
            f"{saw} of {config.model.context} tokens; "
            f"export a later checkpoint"
        )
    if config.local_layers and config.model.chunks > 1:
        key = "mode" if config.compress.mode == "local" else "remote_last_layers"
        raise ConfigError(
            f"compress.{key} = {getattr(config.compress, key)!r}: in {config.local_layers} of {config.model.layers} "
            f"layers a token sees no further than its chunk of {config.model.chunk_tokens} tokens, and a Llama's mask "
            f"cannot say that"
        )
    if compresses(config, step):
        _check_folds(config)
    whole_format = formats_of(config.compress)[1]
    if config.model.chunks > 1 and whole_format not in ("float32", *ROUNDING):
        raise ConfigError(
            f"this model sends K and V as {whole_format} (compress.format, compress.dense_format): what it was "
            f"trained to read of other chunks is not what a Llama would; expected float32, {', '.join(ROUNDING)}"
        )


def _check_folds(config: Config) -> None:
    compress = config.compress
    if compress.own == "exact":
        reason = (
            'own = "exact": a token sees its own chunk as it is and others through the subspace, so no single matrix '
            "makes its keys"
        )
    elif compress.rotation != "fixed" and compress.clip > 0:
        whose = "with the data" if compress.learns_theta else "from chunk to chunk"
        reason = f"rotation = {compress.rotation!r}: the subspace turns {whose}, so no single matrix makes K or V"
    elif formats_of(compress)[0] != "float32":
        reason = f"format = {formats_of(compress)[0]!r}: what crosses between chunks is rounded, within them it is not"
    else:
        return
    steps = config.train.steps
    more = max(1, round(UNPLUGGED_SHARE * steps))
    raise ConfigError(
        f"this model still compresses, and cannot be exported exactly: compress.{reason}. Train it on for some steps "
        f"without compression, and export that: isthmus run {config.run.folder / CONFIG} --run.resume true "
        f"--train.steps {steps + more} --compress.unplug_step {steps}"
    )


def rounding_note(config: Config) -> str:
    """How a plain model's logits may differ from those in training; empty where they do not."""
    whole_format = formats_of(config.compress)[1]
    if whole_format == "float32" or config.model.chunks == 1:
        return ""
    return f"training read K and V of other chunks as {whole_format}; the exported model does not round them"


def plain_weights(config: Config, model: ExchangedLlama, step: int) -> dict[str, Tensor]:
    """Weights by the names of `transformers`' LlamaForCausalLM; projections, where there are any, folded in."""
    weights = {
        to_hf(name): parameter.detach().contiguous()
        for name, parameter in model.named_parameters()
        if ".codecs." not in name
    }
    if compresses(config, step):
        for (layer, kind), codec in model.codecs():
            name = f"layers.{layer}.self_attn.{kind}_proj"
            projection = model.get_submodule(name)
            assert isinstance(projection, nn.Linear)
            weights[to_hf(f"{name}.weight")] = folded(projection.weight.detach(), codec)
    return weights


def folded(weight_Kd: Tensor, codec: Codec) -> Tensor:
    """ŪŪᵀW of each group of rows, for a codec that does not turn: [d_kv, d]; UDᵀW for one that was learned."""
    down_GDr, up_GDr = (matrix.detach().double() for matrix in codec.matrices())
    weight_GDd = weight_Kd.double().unflatten(0, (codec.shape.groups, codec.shape.width))
    projected: Tensor = (up_GDr @ (down_GDr.mT @ weight_GDd)).flatten(0, 1)
    return projected.to(torch.float32).contiguous()
