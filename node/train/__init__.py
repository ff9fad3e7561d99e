"""Training: `trainer` is one step straight down the page; the rest are its parts.

`schedule` says what happens at which step, `averaging` moves vectors round the ring, `basis` ends the warm start,
`passes` computes the loss, with several passes in flight, and `head` its last part; `optimizer` and `evaluate` do what
their names say, `checkpoint` writes and reads what a run resumes from.
"""
