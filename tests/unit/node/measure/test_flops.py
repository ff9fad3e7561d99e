"""FLOPs of a run's MFU are those of the planner; which devices have a peak."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from helpers.worlds import WORLDS, full_spec, tiny_config

from node.config import Config
from node.lab.plan.model import Model
from node.lab.plan.work import VOCABULARY
from node.measure.devices import DEVICES, peak_of
from node.measure.flops import step_flops


def flops(config: Config, own: Sequence[int], vocabulary: int) -> float:
    return step_flops(config.model, config.compress, config.train.batch, own, full_spec(config), vocabulary)


@pytest.mark.parametrize(
    ("mode", "nodes"),
    [
        ({"mode": "dense"}, 1),
        ({"mode": "dense"}, 4),
        ({"mode": "local"}, 2),
        ({"mode": "dense", "remote_last_layers": 1}, 2),
    ],
)
def test_all_nodes_together_have_the_planners_flops(mode: dict[str, str], nodes: int) -> None:
    """Where nothing is compressed: the planner counts the codecs too."""
    config = tiny_config(compress=mode, coordinator={"nodes": nodes, "assignment": "zigzag"})
    assignment = config.assignment()
    vocabulary = VOCABULARY[config.data.tokenizer]
    parts = [flops(config, assignment.chunks(rank), vocabulary) for rank in range(nodes)]
    assert sum(parts) == pytest.approx(Model(config).flops, rel=1e-12)
    assert min(parts) > 0


def test_compression_is_not_the_models_work_and_late_chunks_are_more_of_it() -> None:
    dense, compressed = tiny_config(compress={"mode": "dense"}), tiny_config()
    first, last = (flops(dense, world, 257) for world in ([0], [3]))
    assert first < last
    assert flops(compressed, [3], 257) == last
    assert sum(flops(dense, own, 257) for own in WORLDS["3+1"]) == pytest.approx(flops(dense, [0, 1, 2, 3], 257))


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-PCIE-40GB", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA A10", None),
        ("cpu", None),
    ],
)
def test_a_peak_is_known_by_the_name_that_cuda_gives(name: str, device: str | None) -> None:
    assert peak_of(name) == (DEVICES[device].peak_flops_per_s if device else None)
