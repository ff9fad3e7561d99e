"""The live page of a run: a small web server beside the coordinator, in a process of its own.

It reads the run's records and asks the coordinator as an operator does, so no browser can hold up a barrier. `state` is
what the page shows, `access` decides who may see and change it, `app` answers requests, `serve` owns the process.
The files under `static` are served as they are; uPlot draws the charts (its licence is beside it).
"""

LINKS = "dashboard.links"
"""The file in a run's folder with the two addresses of a page that is served, secrets included; for its owner only."""
