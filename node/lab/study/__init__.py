"""`isthmus study`: a named table of arms × seeds, run on this machine through the real model and trainer.

Reading order: `table` (what a study is: data in `tables/`), `plan` (its runs, checked and named by a digest), `pool`
(one process a run, in parallel, resumable), `trial` (such a process: all nodes in it, without sockets; `memory` joins
them, `measure` looks at the model), `figures` (means, context gain, bytes), `document` and `picture` (what is written).
It decides nothing about the method; it shows what each part of it is worth.
"""
