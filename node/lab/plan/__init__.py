"""The planner: the duration of a step, predicted from a config and a network, without running anything.

Reading order: `work` (FLOPs and other work of a layer, by stage), `devices` and `costs` (from work to seconds),
`lines` (links and NICs as arrays, and how they delay messages), `simulate` (one step on all nodes at once), `pipeline`
and `stage_process` (one step of nodes with pipeline stages, event by event, over the lines of `fluid`), `averaging`,
`model` (a config's step as work), `memory`, `predict` (all of that for one config), `compare` (over nodes, rates,
contexts), `text` and `picture`. `fit`, `validate` and `trials` compare it with runs, `paper` with the paper's figures;
`layouts` plans nodes of several devices.

Shapes: C chunks, R ranks (nodes). [C, R] is "chunk c, as rank r sees it".
"""
