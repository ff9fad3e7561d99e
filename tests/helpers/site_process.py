"""One process of one of two sites, as a script: a pass in every mode, over gloo within the site and sockets across.

``python site_process.py SITE FOLDER`` in torchrun's environment. The addresses of the column's endpoints are exchanged
by files in FOLDER, as are the results: NAME.SITE.RANK.safetensors has this process's loss and the payload bytes that it
sent; that of site 0 has, after averaging with the column, the whole gradients too.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import save_file

from coordinator.assignment import assign
from coordinator.layout import Layout
from helpers.small import contexts, small_config, small_model
from netem.endpoint import Endpoint
from netem.profile import Profile
from node.config import Config
from node.exchange.chunks import ChunkExchange
from node.exchange.inbox import Inbox, Members
from node.exchange.passes import PassSpec
from node.exchange.wire import Wire
from node.site.sharding import own_gradients, shard, sum_replicated, whole_rows
from node.site.site import Site
from node.site.steady import SteadyWire
from node.train.averaging import all_reduce, flatten, unflatten_into
from node.train.from_config import payload_format
from node.train.optimizer import clip_gradients
from node.train.passes import loss_sum

SHARDS, SITES, BATCH = 2, 2, 4
CASES: dict[str, dict[str, Any]] = {
    "dense": {"mode": "dense"},
    "local": {"mode": "local"},
    "geodesic": {"rotation": "geodesic"},
    "taylor2, a basis a head": {"rotation": "taylor2", "scope": "head"},
    "learned": {"rotation": "fixed", "subspace": "learned"},
    "whitened": {"rotation": "fixed", "subspace": "learned", "centred": True, "whitened": True},
    "theta of the chunk before": {"theta": "previous", "own": "projected", "generators": 2},
    "only the last layer sees far": {"remote_last_layers": 1, "dense_last_layers": 0},
    "in two passes, recomputed": {},
    "untied, with odd widths": {},
}
TIMEOUT_S = 60.0


def config_of(case: str, shards: int = 1) -> Config:
    """The config of a case, for two sites of so many shards."""
    model = {"ffn_dim": 97, "tied": False} if case.startswith("untied") else {}
    config = small_config(batch=BATCH, model=model, **({"mode": "subspace"} | CASES[case]))
    coordinator = msgspec.structs.replace(config.coordinator, nodes=SITES, shards=shards)
    config = msgspec.structs.replace(config, coordinator=coordinator)
    if case == "in two passes, recomputed":
        train = msgspec.structs.replace(config.train, micro_batches=2)
        run = msgspec.structs.replace(config.run, recompute=True)
        config = msgspec.structs.replace(config, train=train, run=run)
    return config


class Column:
    """This process's way to the other site's process of its column."""

    def __init__(self, number: int, site: Site, config: Config, place: int, folder: Path) -> None:
        payload = payload_format(config)
        self.inbox = Inbox(payload, ring_cap_bytes=64 << 20)
        names = tuple(f"node-{other}" for other in range(SITES))
        self.endpoint = Endpoint(names[place], "test", Profile(), self.inbox, bind="tcp://127.0.0.1:0")
        self.endpoint.set_generation(1)
        mine = folder / f"{number}.{place}.{site.rank}.address"
        mine.with_suffix(".part").write_text(self.endpoint.address)
        mine.with_suffix(".part").rename(mine)
        for other in range(SITES):
            if other != place:
                self.endpoint.connect(names[other], await_text(folder / f"{number}.{other}.{site.rank}.address"))
        members = Members(1, assign(4, SITES), place, names)
        self.inbox.enter(members)
        self.wire = Wire(self.endpoint, self.inbox, members, payload, TIMEOUT_S)
        self.exchange = ChunkExchange(assign(4, SITES), place, payload, SteadyWire(self.wire, site))


def await_text(path: Path) -> str:
    deadline = time.monotonic() + TIMEOUT_S
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not come"
        time.sleep(0.01)
    return path.read_text()


def run(number: int, case: str, place: int, site: Site, folder: Path) -> None:
    """One case: a pass forward and backward, and the average of gradients over the column."""
    config = config_of(case, SHARDS)
    spec = PassSpec(config.model.chunk_tokens, config.compress.compresses)
    model = shard(small_model(config), site, torch.device("cpu"))
    column = Column(number, site, config, place, folder)
    loss = loss_sum(model, column.exchange, site.part(contexts(config)), spec)
    loss.backward()
    sum_replicated(model, site)
    site.check()
    assert column.endpoint.flush(10.0)
    sent = sum(link.payload_bytes for link in column.endpoint.counters().values())
    gradients = own_gradients(model)
    total = all_reduce(flatten(gradients.values()), place, SITES, column.wire, 1).total
    unflatten_into(total, gradients.values())
    assert column.endpoint.flush(10.0)
    ring = sum(link.payload_bytes for link in column.endpoint.counters().values()) - sent
    found = whole_rows(model, {name: gradient.clone() for name, gradient in gradients.items()})
    results = found if place == 0 and site.rank == 0 else {}
    norm = clip_gradients(model, 0.0, site)
    results |= {"loss": loss.detach().reshape(1), "norm": norm.reshape(1)}
    results |= {"bytes": torch.tensor([sent, ring, len(total)])}
    save_file({name: tensor.contiguous() for name, tensor in results.items()}, folder / f"{number}.{place}.{site.rank}")
    site.gather(torch.zeros(1))  # nobody closes before all have what they wait for
    column.endpoint.close()


def main() -> None:
    torch.set_num_threads(1)
    place, folder = int(sys.argv[1]), Path(sys.argv[2])
    site = Site.from_environment(Layout(SITES, 1, SHARDS))
    site.open(torch.device("cpu"), TIMEOUT_S)
    for number, case in enumerate(CASES):
        run(number, case, place, site, folder)
    site.close()


if __name__ == "__main__":
    main()
