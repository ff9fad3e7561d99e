"""The wind tunnel: a small model on this host, under a network in the same proportion to it as the target's network is
to the target.

A model wing behaves like the big one at the same Reynolds number. Here the numbers are, for each layer, the time of its
payloads on the wire over the time of its compute; latency over the same; and an averaging round over the compute of the
steps between two. Reading order: `similitude` (those numbers, and the network that makes them equal; arithmetic only),
`network` (that network as a profile), `small` (the configs of the small runs), `bench` and `bench_node` (how long the
small model computes here), `design` (from a target to its tunnel), `check` (the numbers of a run), `page`.
"""
