"""`isthmus study`: a named table of arms × seeds, run on this machine through the real model and trainer.

Reading order: `table` (a study as data, in `tables/`), `runs` (its runs, checked and named by a digest), `pool` (one
process for each run, in parallel, resumable), `trial` (such a process: all nodes in it, without sockets, joined by
`node.lab.in_process`; `start` says from which weights), `measure` and `scores` (losses and ranks of a model), `record`
(the file with all figures), `figures` (means, context gain, bytes), `far` (far context, with intervals), `document`,
`far_page` and `picture` (the page). A study decides nothing about the method; it shows the worth of each part.
"""
