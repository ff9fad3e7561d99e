"""The coordinator: who is here, who owns which chunk, when a step starts, whether an averaging round counts.

Knows names, chunks, steps and digests; no tensors, no training, and of the network only `netem.endpoint`.
Reading order:

1. `messages`    what is said on the wire, and how it is checked
2. `assignment`  chunks to ranks; `ring` the schedule of an all-reduce (both pure arithmetic)
3. `membership`, `barrier`, `rounds`, `saves`   small machines: who is here, who is ready, what is agreed, what is saved
4. `plan`, `events`, `run`   the coordinator's protocol: those in one table of (phase, event)
5. `live`        the network's schedule, and changes of it by command, as a part of that
6. `member`      the node's side of the same protocol
7. `server`, `client`, `operator`   thin shells that add an endpoint, a clock and threads; `recorder` writes metrics

`config` is the section [coordinator].
"""
