"""The laboratory, which the job does not need: `plan` predicts, `tunnel` runs a small likeness, `study` compares.

`in_process` is several nodes in one process, without sockets.
"""
