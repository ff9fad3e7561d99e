"""A process's place in its site, and a wire that never breaks a pass off. What several processes do is in
tests/integration/test_sites.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from coordinator.layout import Layout
from netem.errors import ConfigError, GenerationOver, PeerLate
from node.exchange.formats import TensorSpec
from node.exchange.passes import PassKey, PassSpec
from node.site.site import Site, SiteLost
from node.site.steady import SteadyWire

TORCHRUN = {"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
KEY = PassKey(3, PassSpec(4, True), True)


def test_torchrun_says_which_process_this_is() -> None:
    site = Site.from_environment(Layout(3, 1, 2), TORCHRUN)
    assert (site.rank, site.size, site.local_rank, site.several) == (1, 2, 0, True)
    assert site.device(torch.device("cuda")) == torch.device("cuda", 0)
    assert site.device(torch.device("cuda:3")) == torch.device("cuda:3")
    assert site.part(torch.arange(8).view(4, 2).numpy()).tolist() == [[2, 3], [6, 7]]


@pytest.mark.parametrize("environment", [{}, TORCHRUN, TORCHRUN | {"WORLD_SIZE": "64"}])
def test_plain_nodes_take_no_notice_of_a_launcher(environment: dict[str, str]) -> None:
    """`isthmus launch` makes each of torchrun's processes a node."""
    site = Site.from_environment(Layout(64), environment)
    assert (site.rank, site.size, site.several) == (0, 1, False)


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({}, "RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT not set here; start each node by torchrun"),
        ({**TORCHRUN, "MASTER_PORT": ""}, "coordinator.shards = 2: MASTER_PORT not set here"),
        ({**TORCHRUN, "WORLD_SIZE": "4"}, "WORLD_SIZE = 4: expected 2 processes in each site"),
        ({**TORCHRUN, "RANK": "2"}, "expected 2 processes in each site"),
        ({**TORCHRUN, "RANK": "-1"}, "RANK = '-1': expected a whole number"),
        ({**TORCHRUN, "LOCAL_RANK": "one"}, "LOCAL_RANK = 'one': expected a whole number"),
    ],
)
def test_a_site_of_another_size_or_half_an_environment_is_refused(environment: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Site.from_environment(Layout(3, 1, 2), environment)
    assert says in str(refused.value)


def test_a_site_of_one_communicates_nothing() -> None:
    site, vector = Site(), torch.ones(3)
    site.open(torch.device("cpu"), 1.0)
    site.agree_on(7)
    assert site.sum(vector) is vector
    assert site.share(vector) is vector
    assert site.share_text("berlin") == "berlin"
    site.check()
    with pytest.raises(GenerationOver, match="gone"), site.together():
        raise GenerationOver("gone")
    site.check()
    site.close()


def test_only_faults_of_torchs_network_mean_that_a_process_is_lost() -> None:
    site = Site(0, 2)
    with pytest.raises(SiteLost, match="another process of this site was lost"), site.guarded():
        raise RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer")
    with pytest.raises(RuntimeError, match="size mismatch"), site.guarded():
        raise RuntimeError("size mismatch")
    with pytest.raises(RuntimeError, match="gloo"), Site().guarded():
        raise RuntimeError("gloo, and no site")


class Late:
    """A wire on which everything is late, or, with `works`, nothing."""

    def __init__(self, works: bool) -> None:
        self.works = works
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            self.calls.append(name)
            if name != "end" and not self.works:
                raise PeerLate("node-1", f"{name} is late")
            return {"first_of": 2, "take": (torch.ones(2),)}.get(name)

        return call


def test_a_pass_that_breaks_goes_on_with_zeros_and_the_site_hears_the_first_reason() -> None:
    site, late = Site(), Late(works=False)
    wire = SteadyWire(late, site)
    specs = (TensorSpec((2, 3), torch.bfloat16), TensorSpec((4,), torch.uint8))
    wire.publish((1,), 0, 0, KEY, ())
    assert wire.first_of("kv", 0, {4: 1, 2: 1}, 3) == 2
    zeros = wire.take("kv", 0, 2, 1, 3, specs, torch.device("cpu"))
    assert [(tuple(tensor.shape), tensor.dtype, float(tensor.sum())) for tensor in zeros] == [
        ((2, 3), torch.bfloat16, 0.0),
        ((4,), torch.uint8, 0.0),
    ]
    wire.send(1, "grad", 0, 2, KEY, ())
    wire.begin(4)
    wire.end(3)
    assert late.calls == ["publish", "end"], "nothing is waited for any more"
    with pytest.raises(PeerLate, match="publish is late"):
        site.check()
    assert not site.is_broken, "the next pass begins anew"


def test_a_pass_that_does_not_break_is_as_without_it() -> None:
    site, fine = Site(), Late(works=True)
    wire = SteadyWire(fine, site)
    wire.begin(3)
    assert wire.first_of("kv", 0, {1: 1, 2: 1}, 3) == 2
    assert wire.take("kv", 0, 2, 1, 3, (), torch.device("cpu"))[0].tolist() == [1.0, 1.0]
    wire.send(1, "grad", 0, 2, KEY, ())
    assert fine.calls == ["begin", "first_of", "take", "send"]
    site.check()
