"""The processes of one site, as one of them sees them: torchrun starts them, and torch.distributed joins them.

Each process is a member of the run in a column of its own (`coordinator.layout`). What the processes of a site must do
alike they do together here: they add up gradients in one order of ranks, so that all get the same bits, and they agree
on whether all can go on. A process that cannot must not leave the others in a collective, since torch can cancel none:
a pass under way is computed to its end with zeros (`node.site.steady`), and at fixed points all learn of it.

A plain node is a site of one process, for which nothing here communicates.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from coordinator.layout import Layout
from netem.errors import ConfigError, GenerationOver, IsthmusError
from node.data.batches import Contexts

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun sets for each process."""

_FAULTS = ("Connection closed by peer", "Connection reset by peer", "Connection refused", "Timed out", "timed out")
"""What torch says of its network in the middle of a long text."""

_SIGNS = (*_FAULTS[:3], "gloo", "NCCL", "TCPStore")
"""Words by which torch's plain `RuntimeError` is known as one of its network."""


class SiteLost(IsthmusError):
    """Another process of this site is gone, or does not answer: the site cannot go on."""


class Site:
    """One process of a site. `rank` is its place in the site, which is its column; `size` counts the processes."""

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0) -> None:
        self.rank = rank
        self.size = size
        self.local_rank = local_rank
        self._fault: IsthmusError | None = None

    @classmethod
    def from_environment(cls, layout: Layout, environment: Mapping[str, str] = os.environ) -> Site:
        """The site that torchrun has started this process in; a site of one where the layout has no larger ones.

        Raises `ConfigError` where there are fewer or more processes than the layout has columns, or where torchrun's
        variables are not whole.
        """
        if layout.columns == 1:
            return cls()
        how = f"start each node by torchrun --nproc-per-node {layout.columns}"
        if missing := [name for name in VARIABLES if not environment.get(name)]:
            raise ConfigError(f"coordinator.shards = {layout.shards}: {', '.join(missing)} not set here; {how}")
        rank, local_rank, size = (_count(environment, name) for name in VARIABLES[:3])
        if size != layout.columns or rank >= size:
            raise ConfigError(
                f"WORLD_SIZE = {size}: expected {layout.columns} processes in each site (coordinator.stages × "
                f"coordinator.shards), with ranks below that; {how}"
            )
        return cls(rank, size, local_rank)

    @property
    def several(self) -> bool:
        """Whether the site has more than one process."""
        return self.size > 1

    def device(self, wanted: torch.device) -> torch.device:
        """What this process computes on: of several GPUs of a machine each process takes its own."""
        several = self.several and wanted.type == "cuda" and wanted.index is None
        return torch.device("cuda", self.local_rank) if several else wanted

    def open(self, device: torch.device, timeout_s: float) -> None:
        """Meet the other processes; collectives wait at most `timeout_s`. Raises `SiteLost` where they do not come."""
        if not self.several:
            return
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "nccl" if device.type == "cuda" else "gloo"
        with self.guarded():
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))

    def close(self) -> None:
        """Leave the other processes."""
        if self.several and dist.is_initialized():
            dist.destroy_process_group()

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Turn what torch raises where a process of the site is gone into `SiteLost`."""
        try:
            yield
        except (dist.DistError, RuntimeError) as error:
            if not self.several or not _is_of_network(error):
                raise
            raise SiteLost(f"another process of this site was lost: {_in_short(error)}") from error

    def gather(self, vector: Tensor) -> list[Tensor]:
        """The vectors of all processes, of equal shape, by rank."""
        if not self.several:
            return [vector]
        parts = [torch.empty_like(vector) for _ in range(self.size)]
        dist.all_gather(parts, vector.contiguous())
        return parts

    def sum(self, vector: Tensor) -> Tensor:
        """The sum over the site, added in the order of ranks: all processes get the same bits."""
        total, *others = self.gather(vector)
        for other in others:
            total = total + other
        return total

    def share(self, tensor: Tensor) -> Tensor:
        """The tensor of the site's first process, in the memory that this one is in."""
        if not self.several:
            return tensor
        shared = tensor.to(self._collective_device(), copy=True)
        dist.broadcast(shared, src=0)
        return shared.to(tensor.device)

    def part(self, contexts: Contexts) -> Contexts:
        """Of a step's contexts, those that this process computes (`Layout.contexts`)."""
        return contexts[self.rank :: self.size]

    def share_text(self, text: str) -> str:
        """What the site's first process says, of at most 64 characters."""
        if not self.several:
            return text
        own = torch.tensor(list(text.encode()[:64].ljust(64)), dtype=torch.uint8)
        return bytes(self.share(own).tolist()).decode().rstrip()

    def note(self, error: IsthmusError) -> None:
        """This process cannot go on, and says so at the next `check`. The first reason counts."""
        self._fault = self._fault or error

    @property
    def is_broken(self) -> bool:
        """Whether this process has noted that it cannot go on."""
        return self._fault is not None

    def check(self) -> None:
        """All processes come here together. Raises what this one has noted, or `GenerationOver` where another has."""
        fault, self._fault = self._fault, None
        if self.several:
            failed = self.gather(torch.tensor([float(fault is not None)], device=self._collective_device()))
            if fault is None and any(bool(flag) for flag in failed):
                raise GenerationOver("another process of this site cannot go on in this generation")
        if fault is not None:
            raise fault

    def agree_on(self, generation: int) -> None:
        """All processes come here with the generation that each has been told of. Returns once all have come with the
        same; raises `GenerationOver` where another process knows a later one."""
        while self.several:
            known = self.gather(torch.tensor([generation], device=self._collective_device()))
            newest = max(int(number) for number in known)
            if generation < newest:
                raise GenerationOver(f"another process of this site is in generation {newest}")
            if all(int(number) == newest for number in known):
                return

    @contextmanager
    def together(self) -> Iterator[None]:
        """What each process does by itself, without collectives. Where one fails, all of them raise, as in `check`."""
        if not self.several:
            yield
            return
        try:
            yield
        except IsthmusError as error:
            self.note(error)
        self.check()

    def _collective_device(self) -> torch.device:
        return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


ALONE = Site()
"""The site of a plain node."""


def _count(environment: Mapping[str, str], name: str) -> int:
    text = environment[name]
    if not text.isdecimal():
        raise ConfigError(f"{name} = {text!r}: expected a whole number, as torchrun sets it")
    return int(text)


def _in_short(error: BaseException) -> str:
    text = str(error)
    found = next((fault for fault in _FAULTS if fault in text), text.splitlines()[0][:200] if text else repr(error))
    return found[0].lower() + found[1:]


def _is_of_network(error: BaseException) -> bool:
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in _SIGNS)
