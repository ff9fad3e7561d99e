"""Folders of tiny Llamas with random weights, as `transformers` itself saves them, and folders of tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from helpers.small import VOCAB

SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "vocab_size": VOCAB,
    "rms_norm_eps": 1e-6,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
"""Of the four turns of a head of 8: one fast, one in between, two slow."""


def save_llama(folder: Path, *, shard: str = "1GB", dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """Save a Llama whose attention is far from uniform; what `transformers` loads of it, in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE | {"attn_implementation": "eager"} | settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter += 0.3 * torch.randn(parameter.shape)
            elif "_proj" in name:
                parameter *= 8.0
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def logits_of(llama: Any, tokens: Tensor) -> Tensor:
    """Logits [B, T, vocab]."""
    with torch.no_grad():
        logits: Tensor = llama(tokens).logits
    return logits


def save_tokenizer(folder: Path, vocab_size: int = 300) -> Any:
    """Train a byte-level BPE on a few sentences, and save it as a folder's; the `tokenizers.Tokenizer`.

    <|im_end|> ends a document.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["It was the best of times, it was the worst of times"] * 4, trainer)
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}'
    )
    return tokenizer
