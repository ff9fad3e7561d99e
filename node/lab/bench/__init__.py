"""Isthmus against its peers on the same wire: `isthmus bench`.

The wire is the kernel's: hosts in network namespaces, each NIC shaped both ways (`netem.verify.lan`). Reading order:
`arms` (who runs, and with which settings), `collectives` and `ring` (the peers' attention over torch.distributed),
`peer` (one process of a peer) and `peers` (all of them, from their parent's side), `nodes` (Isthmus itself, as real
processes), `local_step` and `local` (a step without a network against a plain Llama), `raw_zmq` and `wire` (messages
alone), `measure` (all of it, in turns), `page` and `picture`.
"""
