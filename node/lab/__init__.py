"""The laboratory, which the job does not need: `plan` predicts, `tunnel` runs a small likeness, `study` compares,
`bench` measures beside others' context parallelism, and `experiment` trains named sets of runs in the tunnel.

`in_process` is several nodes in one process, without sockets.
"""
