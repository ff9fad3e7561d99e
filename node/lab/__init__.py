"""What asks questions of a run, beside the job: `plan` predicts, `tunnel` shrinks, `study` compares.

`in_process` is several nodes in one process, without sockets.
"""
