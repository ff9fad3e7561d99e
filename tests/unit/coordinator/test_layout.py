"""Sites × stages × shards: every process has one place, one rank and one column, and all contexts are computed once."""

from __future__ import annotations

import itertools

import pytest

from coordinator.layout import Layout, Spot
from netem.errors import ConfigError

LAYOUTS = [Layout(*counts) for counts in itertools.product(range(1, 5), range(1, 5), range(1, 5))]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_ranks_and_spots_are_one_to_one(layout: Layout) -> None:
    spots = [Spot(*spot) for spot in itertools.product(range(layout.sites), range(layout.stages), range(layout.shards))]
    assert [layout.rank(spot) for spot in spots] == list(range(layout.processes))
    assert [layout.spot(rank) for rank in range(layout.processes)] == spots


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_sites_and_columns_cross_once(layout: Layout) -> None:
    ranks = set(range(layout.processes))
    sites = [layout.ranks_of_site(site) for site in range(layout.sites)]
    columns = [layout.ranks_of_column(column) for column in range(layout.columns)]
    assert sorted(itertools.chain(*sites)) == sorted(itertools.chain(*columns)) == sorted(ranks)
    for (site, in_site), (column, in_column) in itertools.product(enumerate(sites), enumerate(columns)):
        (common,) = set(in_site) & set(in_column)
        assert in_site[column] == in_column[site] == common
        assert layout.column(common) == column
        assert layout.spot(common).site == site
        assert layout.spot(common)[1:] == divmod(column, layout.shards)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("batch", [1, 2, 3, 4, 7])
def test_the_shards_of_a_stage_compute_all_contexts_once(layout: Layout, batch: int) -> None:
    for stage in range(layout.stages):
        columns = [layout.column(layout.rank(Spot(0, stage, shard))) for shard in range(layout.shards)]
        computed = [context for column in columns for context in layout.contexts(column, batch)]
        assert sorted(computed) == list(range(batch))
    assert [list(layout.contexts(column, batch)) for column in range(layout.shards)] == [
        list(range(batch))[shard :: layout.shards] for shard in range(layout.shards)
    ]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_what_is_outside_is_refused(layout: Layout) -> None:
    calls = [
        lambda: layout.spot(layout.processes),
        lambda: layout.column(-1),
        lambda: layout.ranks_of_column(layout.columns),
        lambda: layout.ranks_of_site(layout.sites),
        lambda: layout.contexts(layout.columns, 1),
        lambda: layout.rank(Spot(0, layout.stages, 0)),
        lambda: layout.rank(Spot(0, 0, -1)),
    ]
    for call in calls:
        with pytest.raises(IndexError):
            call()


@pytest.mark.parametrize("counts", [(0, 1, 1), (1, 0, 1), (1, 1, -2)])
def test_every_count_is_at_least_one(counts: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigError, match="expected at least 1"):
        Layout(*counts)


def test_plain_nodes_are_sites_of_one() -> None:
    layout = Layout(3)
    assert (layout.columns, layout.processes) == (1, 3)
    assert layout.ranks_of_column(0) == (0, 1, 2)
    assert list(layout.contexts(0, 4)) == [0, 1, 2, 3]
    assert str(Layout(8, 4, 1)) == "8 sites × 4 stages × 1 shards"
