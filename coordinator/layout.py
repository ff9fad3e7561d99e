"""Where the processes of a run stand: sites × stages × shards. Pure arithmetic on small integers.

A site is a group of processes, started by torchrun, that hold one model together: it has S stages, the pipeline's
parts, of G shards each. A run has N sites of the same shape. For each coordinate (stage, shard) the N processes with
that coordinate, one in each site, form a column. Keys, values and averages travel within a column across sites; all
else stays within a site. A run of plain nodes has sites of one process, and one column.

The global rank counts sites first, then stages, then shards, as torchrun counts the processes of one site: the local
rank within a site is the column's number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from netem.errors import ConfigError


class Spot(NamedTuple):
    """The place of one process."""

    site: int
    stage: int
    shard: int


class SitePlace(NamedTuple):
    """One process of a site, as it says of itself: the name of the site, its local rank, and how many there are."""

    site: str = ""
    local_rank: int = 0
    processes: int = 1


PLAIN = SitePlace()
"""A plain node: a site of its own, whose name is the node's."""


@dataclass(frozen=True)
class Layout:
    """N sites of S stages × G shards each. Raises `ConfigError` for a count below 1."""

    sites: int
    stages: int = 1
    shards: int = 1

    def __post_init__(self) -> None:
        for name in ("sites", "stages", "shards"):
            if getattr(self, name) < 1:
                raise ConfigError(f"layout: {name} = {getattr(self, name)}, expected at least 1")

    @property
    def columns(self) -> int:
        """S·G: the processes of one site, and the number of columns."""
        return self.stages * self.shards

    @property
    def processes(self) -> int:
        """N·S·G: all processes of the run."""
        return self.sites * self.columns

    def rank(self, spot: Spot) -> int:
        """The global rank of the process at `spot`. Raises `IndexError` where the layout has no such place."""
        for name, place, count in zip(Spot._fields, spot, (self.sites, self.stages, self.shards), strict=True):
            _require(name, place, count)
        return (spot.site * self.stages + spot.stage) * self.shards + spot.shard

    def spot(self, rank: int) -> Spot:
        """The place of a global rank. Raises `IndexError` for one that is not in the run."""
        site, column = divmod(_require("rank", rank, self.processes), self.columns)
        return Spot(site, *divmod(column, self.shards))

    def column(self, rank: int) -> int:
        """The column of a global rank, which is also its local rank within its site."""
        return _require("rank", rank, self.processes) % self.columns

    def ranks_of_column(self, column: int) -> tuple[int, ...]:
        """The global ranks of a column, by site."""
        _require("column", column, self.columns)
        return tuple(range(column, self.processes, self.columns))

    def ranks_of_site(self, site: int) -> tuple[int, ...]:
        """The global ranks of a site, by column."""
        first = _require("site", site, self.sites) * self.columns
        return tuple(range(first, first + self.columns))

    def contexts(self, column: int, batch: int) -> range:
        """Which of a step's `batch` contexts a column computes: every G-th one from its shard on.

        The stages of a pipeline compute the same contexts one after another, so all columns of one shard have the same.
        """
        return range(_require("column", column, self.columns) % self.shards, batch, self.shards)

    def __str__(self) -> str:
        return f"{self.sites} sites × {self.stages} stages × {self.shards} shards"


def check_stages(layout: Layout) -> None:
    """Raise `ConfigError` for a layout with pipeline stages, which can be planned and not yet trained."""
    if layout.stages > 1:
        raise ConfigError(
            f"coordinator.stages = {layout.stages}: expected 1; isthmus plan and isthmus tunnel know pipelines, and no "
            "run has them yet"
        )


def _require(name: str, number: int, count: int) -> int:
    if not 0 <= number < count:
        raise IndexError(f"{name} {number} of {count}")
    return number
