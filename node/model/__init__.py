"""The decoder and its attention over chunks.

`llama` is the model as a reader of the Llama papers knows it; `attention` is causal attention whose keys and
values arrive chunk by chunk; `kernels` computes one block of it. None of these knows of sockets: remote chunks
come through the exchange that is passed in (`node.exchange`).
"""
