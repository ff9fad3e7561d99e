"""The coordinator: the members of a run, the chunks of each, when a step starts, whether an averaging round counts.

It knows names, chunks, steps and digests; no tensors, no training, and of the network only `netem.endpoint`.
Reading order:

1. `messages`    the messages on the wire, and how they are checked
2. `assignment`  chunks to ranks; `ring` the schedule of an all-reduce (both pure arithmetic)
3. `membership`, `barrier`, `rounds`, `saves`   small machines: the members, who is ready, the votes, the checkpoints
4. `table`, `plan`, `events`, `run`   the coordinator's protocol: one table of (phase, event)
5. `live`        the network's schedule, and changes of it by command
6. `member`      the node's side of the same protocol; `diagram` draws both tables into docs/protocol.md
7. `keyring`, `doorkeeper`   the run's keys, and who gets in
8. `server`, `client`, `operator`   thin shells that add an endpoint, a clock and threads; `records` keeps the metrics
9. `files`       checkpoints, brought together at the coordinator and given out again
10. `survey`     machines that examine each other before a run (`isthmus doctor`)

`config` is the section [coordinator]. What is public, for use from Python; all else may change without notice:

- `coordinator.server.CoordinatorServer`, `coordinator.client.Session`: the two sides of a run, over `netem` endpoints
- `coordinator.assignment.assign`, `coordinator.assignment.Assignment`: which node owns which chunks
- `coordinator.records.metrics.read_records`, `coordinator.records.folder.latest_complete`: what a run has written
"""
