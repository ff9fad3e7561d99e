"""Dense mode is the Llama of `transformers`: the same weights give the same logits, loss and gradients.

Measured in float32, relative to each tensor's largest entry: logits 4e-7, loss 1e-7, gradients 7e-7.
"""

import pytest
import torch
from helpers.small import VOCAB, contexts, largest_difference
from helpers.worlds import WORLDS, exchange_of, full_spec, logits_of, tiny_config

from node.model.llama import Llama, Step
from node.train.from_config import drawn_model
from node.train.passes import loss_sum, own_tokens

TOLERANCE = 1e-5


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("sizes", [{}, {"kv_heads": 1}, {"kv_heads": 4}, {"head_dim": 12}], ids=str)
def test_dense_mode_equals_the_llama_of_transformers(tied: bool, sizes: dict[str, int]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = tiny_config(compress={"mode": "dense"}, model={"tied": tied, "rope_theta": 1000.0, **sizes})
    wanted = config.model
    ours = drawn_model(config, VOCAB)
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=wanted.d_model,
            intermediate_size=wanted.ffn_dim,
            num_hidden_layers=wanted.layers,
            num_attention_heads=wanted.heads,
            num_key_value_heads=wanted.kv_heads,
            head_dim=wanted.head_size,
            max_position_embeddings=wanted.context,
            rms_norm_eps=wanted.norm_eps,
            rope_theta=wanted.rope_theta,
            tie_word_embeddings=tied,
            attn_implementation="eager",
        )
    )
    names = {name: name if name.startswith("lm_head") else f"model.{name}" for name in dict(ours.named_parameters())}
    weights = {names[name]: parameter.detach() for name, parameter in ours.named_parameters()}
    missing = theirs.load_state_dict(weights, strict=False)
    assert (missing.missing_keys, missing.unexpected_keys) == (["lm_head.weight"] if tied else [], [])

    batch = contexts(config)
    exchange, spec = exchange_of(config, WORLDS["1"], 0, None), full_spec(config)
    inputs, _ = own_tokens(batch, exchange.own, spec, torch.device("cpu"))
    logits = logits_of(ours, inputs, exchange, spec).movedim(0, 1).flatten(1, 2)
    tokens, targets = torch.from_numpy(batch[:, :-1]), torch.from_numpy(batch[:, 1:])
    their_logits = theirs(tokens).logits
    assert largest_difference({"logits": logits.detach()}, {"logits": their_logits.detach()}) < TOLERANCE

    loss = loss_sum(ours, exchange, batch, spec)
    their_loss = torch.nn.functional.cross_entropy(their_logits.flatten(0, 1), targets.flatten(), reduction="sum")
    assert loss.item() == pytest.approx(their_loss.item(), rel=1e-6)

    loss.backward()
    their_loss.backward()
    gradients = {names[name]: parameter.grad for name, parameter in ours.named_parameters()}
    their_gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    difference = largest_difference(gradients, their_gradients)
    print(f"largest difference of a gradient: {difference:.1e}")
    assert difference < TOLERANCE


def test_the_plain_llama_is_the_exchanged_one_without_chunks() -> None:
    """Uncompressed, over four chunks of one node: the same function of the tokens."""
    config = tiny_config(compress={"mode": "dense"})
    plain, ours = Llama(config.model, VOCAB, config.run.seed), drawn_model(config, VOCAB)
    assert dict(plain.named_parameters()).keys() == dict(ours.named_parameters()).keys()
    tokens = torch.from_numpy(contexts(config)[:, :-1])
    positions = torch.arange(tokens.shape[-1])
    exchange = exchange_of(config, WORLDS["1"], 0, None)
    chunks = torch.stack(tokens.chunk(config.model.chunks, dim=1))
    found = logits_of(ours, chunks, exchange, full_spec(config)).movedim(0, 1).flatten(1, 2)
    wanted = plain(tokens, Step(plain.rope(tokens.device), positions))
    assert largest_difference({"": found.detach()}, {"": wanted.detach()}) < TOLERANCE
