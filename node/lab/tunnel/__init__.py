"""The wind tunnel: a small model on this host, under a network that is to it what the target's is to the target.

A model wing behaves like the big one at the same Reynolds number. Here the numbers are, layer by layer, the time that
payloads take on the wire over the time that the layer computes; latency over the same; and an averaging round over the
compute of the steps between two. Reading order: `similitude` (those numbers, and the network that makes them equal;
arithmetic only), `network` (that network as a profile), `small` (the configs of the small runs), `bench` and
`bench_node` (what the small model computes here), `check` (what a run had, from its records), `report`.
"""
