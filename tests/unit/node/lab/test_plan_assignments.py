"""`coordinator.assignment = "auto"`: the shortest step wins, memory is respected, and run and planner agree."""

from __future__ import annotations

import json
import logging
from itertools import combinations
from pathlib import Path

import pytest
from helpers import ROOT
from helpers.small import small_config

from coordinator.plan import Worker
from coordinator.records.folder import CONFIG
from netem.config import convert
from netem.errors import ConfigError
from netem.profile import resolve
from node.cli import main
from node.commands import coordinator, run
from node.commands.coordinator import settle_assignment
from node.config import Config, load_config, to_tree
from node.lab.plan.assignments import balanced_runs, choose, settle, share_out
from node.lab.plan.costs import Costs
from node.lab.plan.lines import lines_of
from node.lab.plan.model import Model
from node.lab.plan.text import choice_lines
from node.measure.devices import Device, device, devices

TINY, PAPER = ROOT / "configs" / "tiny.toml", ROOT / "configs" / "paper-800m.toml"
COSTS = Costs(flops_per_s=2e9)
WIDE = {"profile": "unshaped"}
FAR = {"profile": "unshaped", "latency": "1 s"}


def auto(nodes: int, chunks: int, net: dict[str, str], *, tokens: int = 128, **owners: object) -> Config:
    """A dense model, so that attention is most of its compute, with `tokens` in each chunk."""
    tree = to_tree(small_config("dense", model={"context": chunks * tokens, "chunks": chunks, "d_model": 16}))
    tree["coordinator"] |= {"nodes": nodes, "assignment": "auto"} | owners
    tree["net"] |= net
    tree["data"]["tokenizer"] = "bytes"
    return convert(Config, tree)


def step_s(config: Config, costs: Costs = COSTS) -> float:
    return Model(config).step_s(costs, lines_of(resolve(config.net), config.coordinator.nodes))


@pytest.mark.parametrize(
    ("net", "best"),
    [
        (WIDE, "zigzag"),  # nothing but compute, which it balances
        (FAR, "contiguous"),  # zigzag waits for every layer; contiguous owners run ahead
    ],
)
def test_what_is_shortest_wins(net: dict[str, str], best: str) -> None:
    choice = choose(auto(4, 8, net), COSTS, devices("cpu", 4))
    assert choice.best.config.coordinator.assignment == best
    assert choice.best.step_s == min(one.step_s for one in choice.candidates)
    for one in choice.candidates:
        assert one.step_s == step_s(one.config)


@pytest.mark.parametrize("nodes", [2, 3, 4, 8])
@pytest.mark.parametrize("rounds", [2, 3, 4, 5])
def test_equal_nodes_compute_evenly_where_compute_decides(nodes: int, rounds: int) -> None:
    choice = choose(auto(nodes, rounds * nodes, WIDE, tokens=64), COSTS, devices("cpu", nodes))
    assert choice.best.evenness >= 0.9


@pytest.mark.parametrize("net", [WIDE, FAR, {"profile": "unshaped", "rate": "20 Mbit/s"}])
@pytest.mark.parametrize("speeds", [(), (1.0, 2.0, 0.5)])
def test_unequal_shares_are_about_the_best_that_there_are(net: dict[str, str], speeds: tuple[float, ...]) -> None:
    chunks = 9
    config = auto(3, chunks, net)
    costs = COSTS.at_rates(speeds) if speeds else COSTS
    choice = choose(config, costs, devices("cpu", 3))
    tree = to_tree(config)
    every = []
    for ends in combinations(range(1, chunks), 2):
        counts = [ends[0], ends[1] - ends[0], chunks - ends[1]]
        tree["coordinator"] |= {"assignment": "contiguous", "chunks_per_node": counts}
        every.append(step_s(convert(Config, tree), costs))
    found = min(one.step_s for one in choice.candidates if one.name.startswith("contiguous"))
    assert found == pytest.approx(min(every), rel=0.01)


def test_a_slow_node_gets_less() -> None:
    assert balanced_runs([1.0] * 9, (1.0, 1.0, 1.0)) == (3, 3, 3)
    assert balanced_runs([1.0] * 10, (2.0, 1.0, 2.0)) == (4, 2, 4)
    assert balanced_runs([1.0] * 4, (100.0, 1.0, 1.0)) == (2, 1, 1)  # each has a chunk
    config = auto(2, 8, WIDE, node_speeds=[0.001, 0.003])
    settled, _ = settle(config)
    assert settled.coordinator.chunks_per_node
    assert settled.coordinator.chunks_per_node[1] > 8 - settled.coordinator.chunks_per_node[1]
    other, _ = settle(auto(2, 8, WIDE, node_speeds=[0.003, 0.001]))
    assert other.coordinator.chunks_per_node[0] > settled.coordinator.chunks_per_node[0]


def test_chunks_are_given_out_anew_by_measured_speeds_and_by_the_memory_that_is_there() -> None:
    config, _ = settle(auto(3, 12, WIDE))
    assert config.coordinator.replan == "plan"

    def lengths(*workers: Worker) -> list[int]:
        return [len(own) for own in share_out(config, workers).to_lists()]

    even = lengths(Worker("node-0", 0, 1e9, 0.0), Worker("node-2", 2, 1e9, 0.0))
    assert sum(even) == 12
    slow = lengths(Worker("node-0", 0, 1e9, 0.0), Worker("node-2", 2, 1e8, 0.0))
    assert slow[1] < even[1]
    assert lengths(Worker("node-0", 0, 0.0, 0.0), Worker("node-2", 2, 1e8, 0.0)) == even, "not all are measured"
    alone = share_out(config, [Worker("node-1", 1, 1e9, 0.0)])
    assert alone.to_lists() == [list(range(12))]
    with pytest.raises(ConfigError, match=r"do not fit on 2 nodes: node-0 would need about .* GB .* has 0.001 GB"):
        share_out(config, [Worker("node-0", 0, 0.0, 1e6), Worker("node-2", 2, 0.0, 1e12)])


def test_a_candidate_that_does_not_fit_is_out_with_its_figure() -> None:
    """Two devices of equal speed, of which the first holds little: it gets less, though that is slower."""
    config = auto(2, 8, WIDE, tokens=512)
    roomy = choose(config, COSTS, devices("cpu", 2))
    needed = roomy.best.room.needed.device
    small = Device("small", 1e11, needed * 0.6, False)
    choice = choose(config, COSTS, (small, device("cpu")))
    assert roomy.best.name == "zigzag"
    assert choice.best.name.startswith("contiguous")
    assert choice.best.room.fits
    assert choice.best.step_s > roomy.best.step_s
    (line,) = (line for line in choice_lines(choice) if line.lstrip().startswith("zigzag"))
    assert "out: node-0 needs" in line


def test_where_nothing_fits_the_least_need_is_taken_and_plan_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", str(PAPER), "--nodes", "2", "--device", "4090", "--coordinator.assignment", "auto"]
    assert main(arguments) == 3
    text = capsys.readouterr().out
    assert "too large:" in text
    assert text.count("; out: node-") >= 2
    assert "auto takes zigzag" in text  # it needs as much as equal runs, and is shorter


def test_other_configs_stay_as_they_are() -> None:
    config = load_config(TINY)
    assert settle(config) == (config, None)
    assert settle_assignment(config) is config


def test_without_a_planner_auto_is_a_mistake() -> None:
    with pytest.raises(ConfigError, match='assignment = "auto": isthmus run, coordinator'):
        auto(2, 4, WIDE).assignment()
    with pytest.raises(ConfigError, match="more nodes than chunks"):
        auto(5, 4, WIDE)


@pytest.mark.parametrize("settings", [[], ["--net.profile=unshaped"], ["--coordinator.node_speeds=[0.01, 0.0025]"]])
def test_run_and_plan_agree(
    settings: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """`isthmus run` saves what `isthmus plan` picks, and logs the same candidates. No process is started here."""
    monkeypatch.setattr(run, "_run", lambda config, page: None)
    monkeypatch.setattr(run, "check_corpus", lambda config: None)
    settings = [f"--run.outputs={tmp_path}", "--model.chunks=8", "--coordinator.assignment=auto", *settings]
    with caplog.at_level(logging.INFO, logger="isthmus.coordinator"):
        done = run.run_swarm(load_config(TINY, settings))
    saved = load_config(done.run.folder / CONFIG)
    assert main(["plan", str(TINY), *settings, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert saved.assignment().to_lists() == plan["owned"]
    assert min(plan["candidates"], key=lambda one: one["step_s"])["owned"] == plan["owned"]
    for one in plan["candidates"]:
        assert one["name"] in caplog.text
    assert main(["plan", str(TINY), *settings]) == 0
    assert caplog.messages[0] in capsys.readouterr().out


def test_a_coordinator_of_its_own_settles_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its nodes have "auto" in their files, so their digests must be the same."""
    served: list[Config] = []
    monkeypatch.setattr(coordinator, "_serve", lambda config, page, lease: served.append(config))
    config = load_config(TINY, [f"--run.outputs={tmp_path}", "--coordinator.assignment=auto"])
    coordinator.run_coordinator(config)
    assert served[0].coordinator.assignment in ("contiguous", "zigzag")
    assert served[0].digest() == config.digest()


def test_a_mix_of_devices_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", str(PAPER), "--nodes", "2", "--model.chunks", "16", "--coordinator.assignment", "auto"]
    assert main([*arguments, "--net", "datacenter-100gbps", "--device", "b200,h200", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["costs"]["speeds"] == pytest.approx([2 * 2250 / 3239, 2 * 989 / 3239])
    assert len(plan["owned"][0]) > 2 * len(plan["owned"][1])
    assert main([*arguments, "--device", "h100,a100,a100"]) == 2
    assert "--device h100,a100,a100: 3 devices; expected 1, or 2" in capsys.readouterr().err


def relayed(net: dict[str, str], **owners: object) -> Config:
    """A model whose payloads take much longer than its compute, with `relay = "auto"`."""
    return auto(4, 4, net, tokens=8192, **({"assignment": "contiguous", "relay": "auto"} | owners))


FAST = COSTS.slowed(1e-4)
CABLE = {"profile": "home-cable"}
NARROW = {"profile": "internet-300mbps", "rate": "10 Mbit/s"}


@pytest.mark.parametrize(
    ("net", "relay"),
    [
        (CABLE, "always"),  # the first node's line up is the narrowest place
        (NARROW, "never"),  # each link has its rate to itself
        (NARROW | {"scope": "nic"}, "never"),  # the last node's line down is as narrow as the first node's line up
        (CABLE | {"scope": "link"}, "never"),
        ({"profile": "home-cable", "rate": "10 Gbit/s"}, "never"),  # what is sent hardly matters
    ],
)
def test_a_relay_is_taken_where_it_is_shorter(net: dict[str, str], relay: str) -> None:
    config = relayed(net)
    settled, choice = settle(config, FAST, devices("cpu", 4))
    assert settled.coordinator.relay == relay
    assert settled.coordinator.assignment == "contiguous"
    assert settled.digest() == config.digest(), "it is the coordinator's word"
    assert (choice is None) == (resolve(config.net).scope == "link")
    if choice is not None:
        direct, other = choice.candidates
        assert (direct.name, other.name) == ("contiguous", "contiguous, relayed")
        assert direct.step_s == step_s(direct.config, FAST)
        assert other.step_s == step_s(other.config, FAST)
        assert (other.step_s <= 0.98 * direct.step_s) == (relay == "always")


def test_ownership_and_a_relay_are_chosen_together() -> None:
    choice = choose(relayed(CABLE, assignment="auto"), FAST, devices("cpu", 4))
    names = [one.name for one in choice.candidates]
    assert [name for name in names if name.endswith(", relayed")] == [
        f"{name}, relayed" for name in names if "rel" not in name
    ]
    assert choice.best.step_s == min(one.step_s for one in choice.candidates)
    assert choice.best.config.coordinator.relay == "always"


def test_there_is_no_relay_between_two_nodes_or_of_documents() -> None:
    for config in (
        auto(2, 4, CABLE, assignment="contiguous", relay="auto"),
        convert(Config, to_tree(relayed(CABLE)) | {"data": {"document_masking": True, "tokenizer": "bytes"}}),
    ):
        settled, choice = settle(config)
        assert settled.coordinator.relay == "never"
        assert choice is None
    with pytest.raises(ConfigError, match=r'relay = "always": expected "never" or "auto", since data.document_masking'):
        convert(Config, to_tree(relayed(CABLE, relay="always")) | {"data": {"document_masking": True}})


def test_without_a_planner_an_automatic_relay_is_a_mistake() -> None:
    with pytest.raises(ConfigError, match=r'coordinator.relay = "auto": isthmus run, coordinator and plan choose'):
        Model(relayed(CABLE))
