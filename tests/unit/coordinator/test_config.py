"""The section [coordinator]: its defaults are legal, its mistakes name key, value and mend."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest

from coordinator.config import CoordinatorConfig
from coordinator.layout import Layout
from netem.config import convert, describe, dump_toml
from netem.errors import ConfigError


def made(**tree: Any) -> CoordinatorConfig:
    return convert(CoordinatorConfig, tree, "coordinator")


def test_the_defaults_are_legal_and_every_setting_is_described() -> None:
    assert made() == CoordinatorConfig()
    assert all(key.description for key in describe(CoordinatorConfig))


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        ({"address": "tcp://*:7070"}, r'coordinator\.address = "tcp://\*:7070": name one interface'),
        ({"address": "tcp://0.0.0.0:7070", "token": "t"}, "name one interface"),
        ({"address": "tcp://[::]:7070", "token": "t"}, "name one interface"),
        ({"address": "127.0.0.1:7070"}, r"expected tcp://INTERFACE:PORT"),
        ({"address": "tcp://127.0.0.1:70000"}, r"expected tcp://INTERFACE:PORT"),
        ({"address": "tcp://127.0.0.1"}, r"expected tcp://INTERFACE:PORT"),
        ({"address": "tcp://10.0.0.5:7070"}, r'coordinator\.token = "": 10\.0\.0\.5 can be reached'),
        ({"address": "tcp://eth0:7070"}, "give a secret token"),
        ({"heartbeat_timeout_s": 1.5}, r"heartbeat_timeout_s = 1\.5: expected at least twice"),
        ({"nodes": 0}, r"coordinator\.nodes = 0"),
        ({"assignment": "random"}, r"coordinator\.assignment"),
        ({"nodes": 2, "chunks_per_node": [3]}, r"chunks_per_node = \[3\]: expected 2 counts"),
        ({"nodes": 2, "chunks_per_node": [3, 0]}, r"chunks_per_node"),
        ({"nodes": 2, "chunks_per_node": [3, 1], "assignment": "zigzag"}, 'assignment = "zigzag"'),
        ({"nodes": 2, "chunks_per_node": [3, 1], "assignment": "auto"}, 'assignment = "auto"'),
        ({"nodes": 2, "node_speeds": [1.0]}, r"node_speeds = \[1.0\]: expected 2 speeds"),
        ({"nodes": 2, "node_speeds": [1.0, 0.0]}, r"node_speeds"),
        ({"heartbeat_intervals": 1}, "did you mean heartbeat_interval_s"),
    ],
)
def test_mistakes(tree: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        made(**tree)


@pytest.mark.parametrize(
    "tree",
    [
        {"address": "tcp://localhost:0"},
        {"address": "tcp://[::1]:7070"},
        {"address": "tcp://lo:7070"},
        {"address": "tcp://127.3.2.1:7070"},
        {"address": "tcp://eth0:7070", "token": "secret"},
        {"nodes": 2, "chunks_per_node": [3, 1]},
        {"nodes": 2, "node_speeds": [125.0, 40.0], "assignment": "auto"},
        {"heartbeat_timeout_s": 30},
    ],
)
def test_what_is_fine(tree: dict[str, Any]) -> None:
    section = made(**tree)
    for key, value in tree.items():
        got = getattr(section, key)
        assert (list(got) if isinstance(got, tuple) else got) == value


def test_nodes_are_sites_of_stages_and_shards() -> None:
    assert made().layout == Layout(1, 1, 1)
    assert made(nodes=8, stages=4, shards=2).layout == Layout(8, 4, 2)


def test_it_survives_toml() -> None:
    tree = {"chunks_per_node": made(nodes=2, chunks_per_node=[3, 1]).chunks_per_node}
    assert tomllib.loads(dump_toml(tree)) == {"chunks_per_node": [3, 1]}
