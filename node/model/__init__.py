"""The decoder and its attention over chunks.

`llama` is the model as a reader of the Llama papers knows it, and knows of no chunks. `exchanged` makes its attention
one over exchanged chunks, with `key_value` between K and V and their payload. `attention` is causal attention whose
keys and values arrive chunk by chunk; `kernels` computes one block of it. `hf` reads the weights of a Llama that others
have trained. None of these knows of sockets: remote chunks come through the pass that is handed in
(`node.exchange.chunks.Pass`).
"""
