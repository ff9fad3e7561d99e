"""`isthmus chaos`: a local run that is disturbed on purpose, by a seed, and what it survived.

`schedule` draws what happens when, without I/O; `door` stands between a node and its callers and harms what passes;
`drive` starts the run and carries the schedule out; `page` says what came of it. Only processes that it has started
itself are harmed.
"""
