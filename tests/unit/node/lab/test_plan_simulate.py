"""The planner's simulation against one segment by segment, and against what can be reckoned by hand."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from helpers import ROOT
from helpers.plan_oracle import step_ends_s
from helpers.small import small_config

from netem.config import convert
from netem.profile import NetConfig, resolve
from node.config import Config, load_config, to_tree
from node.exchange.documents import Documents, Run
from node.exchange.payload import link_bytes, step_bytes
from node.exchange.routes import routes_for
from node.lab.plan.costs import Costs
from node.lab.plan.documents import assumed, expected
from node.lab.plan.lines import Lines, lines_of
from node.lab.plan.model import Model
from node.lab.plan.predict import unlimited
from node.lab.plan.simulate import crowding

PAPER = ROOT / "configs" / "paper-800m.toml"
COSTS = Costs(flops_per_s=2e9)


def model_of(mode: str, nodes: int, passes: int = 1, grad_format: str = "same", **coordinator: object) -> Model:
    """A model whose passes have two contexts each."""
    tree = to_tree(small_config(mode, model={"context": 1024, "chunks": 8}, grad_format=grad_format))
    tree["train"] |= {"batch": 2 * passes, "micro_batches": passes}
    tree["coordinator"] |= {"nodes": nodes} | coordinator
    return Model(convert(Config, tree))


def lines(nodes: int, rate: str, scope: str, latency: str = "2 ms") -> Lines:
    return lines_of(resolve(NetConfig(profile="unshaped", rate=rate, scope=scope, latency=latency)), nodes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("nodes", "coordinator"),
    [
        (2, {}),
        (4, {}),
        (4, {"assignment": "zigzag"}),
        (8, {}),
        (2, {"chunks_per_node": [5, 3]}),
        (3, {"chunks_per_node": [1, 2, 5]}),
    ],
)
@pytest.mark.parametrize("scope", ["link", "nic"])
@pytest.mark.parametrize("rate", ["5 Mbit/s", "50 Mbit/s", "1 Gbit/s"])
@pytest.mark.parametrize("mode", ["subspace", "dense"])
def test_a_step_takes_what_it_takes_event_by_event(
    nodes: int, coordinator: dict[str, object], scope: str, rate: str, mode: str
) -> None:
    """Links are exact; at a NIC, messages of one layer that overtake those of another make up to 3 %."""
    compare_with_oracle(model_of(mode, nodes, **coordinator), lines(nodes, rate, scope), scope)


@pytest.mark.parametrize(
    ("nodes", "passes", "coordinator"),
    [
        (2, 2, {}),
        (2, 3, {"assignment": "zigzag"}),
        (4, 2, {}),
        (4, 2, {"assignment": "zigzag"}),
        (4, 4, {"assignment": "zigzag"}),
        (3, 2, {"chunks_per_node": [1, 2, 5]}),
    ],
)
@pytest.mark.parametrize("scope", ["link", "nic"])
@pytest.mark.parametrize("rate", ["5 Mbit/s", "20 Mbit/s", "100 Mbit/s"])
def test_passes_that_take_turns_take_what_they_take_event_by_event(
    nodes: int, passes: int, coordinator: dict[str, object], scope: str, rate: str
) -> None:
    """Gradients have a format of their own here, so both directions differ too."""
    model = model_of("dense", nodes, passes, "int8", **coordinator)
    compare_with_oracle(model, lines(nodes, rate, scope), scope)


@pytest.mark.parametrize("coordinator", [{}, {"assignment": "zigzag"}])
@pytest.mark.parametrize("scope", ["link", "nic"])
@pytest.mark.parametrize("rate", ["1 Mbit/s", "5 Mbit/s", "50 Mbit/s"])
@pytest.mark.parametrize("mode", ["subspace", "dense"])
def test_messages_of_unequal_sizes_take_what_they_take_event_by_event(
    coordinator: dict[str, object], scope: str, rate: str, mode: str
) -> None:
    """Where attention stays within documents, near readers get more of a chunk than far ones."""
    compare_with_oracle(masked(mode, 4, 300.0, **coordinator), lines(4, rate, scope), scope)


def masked(mode: str, nodes: int, document_tokens: float, **coordinator: object) -> Model:
    tree = to_tree(model_of(mode, nodes, **coordinator).config)
    tree["data"] |= {"document_masking": True, "document_tokens": document_tokens}
    return Model(convert(Config, tree))


@pytest.mark.parametrize("coordinator", [{}, {"assignment": "zigzag"}])
def test_expected_bytes_are_the_mean_over_contexts(coordinator: dict[str, object]) -> None:
    """Two thousand contexts with documents that end at random, counted by the formula of the wire."""
    mean_tokens, count, draw = 100.0, 2000, np.random.default_rng(0)
    model = masked("dense", 4, mean_tokens, **coordinator)
    context = model.config.model.context
    documents = Documents(draw.random((count, context)) < 1 / mean_tokens, model.spec.tokens)
    sent = model.simulate(COSTS, lines(4, "1 Gbit/s", "link")).sent_bytes.sum(1)
    for rank in range(4):
        formula = step_bytes(model.payload, model.config.assignment(), rank, model.spec, documents).total
        assert sent[rank] == pytest.approx(formula * model.payload.batch / count, rel=0.04)


@pytest.mark.parametrize("coordinator", [{}, {"assignment": "zigzag"}])
def test_expected_pairs_are_the_mean_over_contexts(coordinator: dict[str, object]) -> None:
    """Chunks of 8 tokens, and documents of 16 in the mean."""
    mean_tokens, tokens, count, draw = 16.0, 8, 4000, np.random.default_rng(0)
    config = masked("dense", 4, mean_tokens, **coordinator).config
    assignment = config.assignment()
    documents = Documents(draw.random((count, 8 * tokens)) < 1 / mean_tokens, tokens)
    left = expected(config, assignment, tokens)
    for rank, chunk in itertools.product(range(4), range(8)):
        own = assignment.chunks(rank)
        tails = documents.tails(chunk, own)
        pairs = sum((run.end - run.begin) * seen_by(documents, chunk, run, own) for run in tails)
        assert left.pairs_CR[chunk, rank] == pytest.approx(pairs / count / tokens**2, rel=0.06, abs=0.006)
    squares = sum((run.end - run.begin + 1) * (run.end - run.begin) for run in documents.parts(3))
    assert left.own == pytest.approx(squares / count / (tokens * (tokens + 1)), rel=0.02)


def seen_by(documents: Documents, chunk: int, run: Run, own: Sequence[int]) -> int:
    """How many queries attend to a tail."""
    return documents.seen_by(chunk, run.context, [reader for reader in own if reader > chunk])


def test_documents_that_never_end_are_none() -> None:
    plain, unknown = model_of("subspace", 4), masked("subspace", 4, 0.0)
    network = lines(4, "20 Mbit/s", "link")
    outcomes = [model.simulate(COSTS, network) for model in (plain, unknown)]
    assert outcomes[0].step_s == outcomes[1].step_s
    assert (outcomes[0].sent_bytes == outcomes[1].sent_bytes).all()
    assert plain.flops == unknown.flops
    short = masked("subspace", 4, 50.0)
    assert short.flops < plain.flops
    assert short.simulate(COSTS, network).sent_bytes.sum() < 0.2 * outcomes[0].sent_bytes.sum()


def test_a_plan_says_what_it_assumes_of_documents() -> None:
    said = [assumed(model.config) for model in (model_of("dense", 2), masked("dense", 2, 0.0), masked("dense", 2, 9.0))]
    assert said[0] == []
    assert "data.document_tokens = 0" in said[1][0]
    assert "9 tokens each in the mean" in said[2][0]


@pytest.mark.parametrize(
    ("nodes", "passes", "coordinator"),
    [
        (3, 1, {}),
        (4, 1, {}),
        (4, 2, {}),
        (4, 1, {"assignment": "zigzag"}),
        (4, 3, {"assignment": "zigzag"}),
        (8, 1, {}),
        (8, 2, {}),
        (4, 2, {"chunks_per_node": [1, 1, 2, 4]}),
    ],
)
@pytest.mark.parametrize("profile", ["home-cable", "home-300mbps", "lte", "internet-300mbps"])
@pytest.mark.parametrize("mode", ["subspace", "dense"])
def test_what_is_relayed_takes_what_it_takes_event_by_event(
    nodes: int, passes: int, coordinator: dict[str, object], profile: str, mode: str
) -> None:
    """Lines are ten times slower than the profile's, so that they matter beside this model's compute."""
    model = model_of(mode, nodes, passes, relay="always", **coordinator)
    network = lines_of(resolve(NetConfig(profile=profile)), nodes).scaled(0.1)
    expected = step_ends_s(model.step, COSTS, network)
    outcome = model.simulate(COSTS, network)
    assert outcome.step_s == pytest.approx(max(expected), rel=0.05)


@pytest.mark.parametrize("coordinator", [{}, {"assignment": "zigzag"}, {"chunks_per_node": [1, 1, 1, 5]}])
def test_what_is_relayed_has_the_bytes_of_the_wires_formula_and_costs_its_messages(
    coordinator: dict[str, object],
) -> None:
    model = model_of("dense", 4, 2, "int8", relay="always", **coordinator)
    network = lines(4, "1 Gbit/s", "nic")
    outcome = model.simulate(COSTS, network)
    assignment = model.config.assignment()
    links = link_bytes(model.payload, assignment, model.spec, relays=True)
    assert outcome.sent_bytes.tolist() == (2 * np.array(links).sum(0)).tolist()
    busy_s = model.simulate(Costs(flops_per_s=COSTS.flops_per_s, message_s=1e-3), network).busy_s
    routes = routes_for(assignment, True, round(model.payload_bytes(0)))
    sent, received, grads = np.zeros(4), np.zeros(4), np.zeros(4)
    for chunk in range(8):
        for sender, receiver, _ in routes.deliveries(chunk, 8000):
            sent[sender] += 1
            received[receiver] += 1
        for reader in assignment.readers_of(chunk):
            grads[[reader, assignment.owner(chunk)]] += 1
    assert busy_s - outcome.busy_s == pytest.approx(2 * 3 * (sent + received + grads) * 1e-3)


def compare_with_oracle(model: Model, network: Lines, scope: str) -> None:
    expected = step_ends_s(model.step, COSTS, network)
    outcome = model.simulate(COSTS, network)
    tolerance = 1e-6 if scope == "link" else 0.04
    assert outcome.step_s == pytest.approx(max(expected), rel=tolerance)


def test_one_node_only_computes() -> None:
    outcome = model_of("subspace", 1).simulate(COSTS, lines(1, "1 Mbit/s", "link"))
    assert outcome.step_s == pytest.approx(outcome.busy_s[0])
    assert outcome.waited_s[0] == 0
    assert outcome.sent_bytes.sum() == 0


def test_compute_is_all_the_flops_there_are() -> None:
    """No FLOP is lost between stages, layers and nodes, and the number of nodes changes none."""
    for nodes in (1, 2, 8):
        model = model_of("subspace", nodes)
        busy_s = model.simulate(COSTS, unlimited(lines(nodes, "1 Gbit/s", "link"))).busy_s
        assert busy_s.sum() * COSTS.flops_per_s == pytest.approx(model.flops, rel=1e-9)


@pytest.mark.parametrize("mode", ["subspace", "dense", "local"])
@pytest.mark.parametrize("coordinator", [{}, {"assignment": "zigzag"}, {"chunks_per_node": [1, 1, 1, 5]}])
@pytest.mark.parametrize(("passes", "grad_format"), [(1, "same"), (3, "int4")])
def test_the_bytes_are_those_of_the_wires_formula(
    mode: str, coordinator: dict[str, object], passes: int, grad_format: str
) -> None:
    model = model_of(mode, 4, passes, grad_format, **coordinator)
    sent = model.simulate(COSTS, lines(4, "1 Gbit/s", "link")).sent_bytes.sum(1)
    assignment = model.config.assignment()
    for rank in range(4):
        assert sent[rank] == passes * step_bytes(model.payload, assignment, rank, model.spec).total


def test_passes_hide_each_others_payloads() -> None:
    """The same contexts in two passes: no FLOP more, about as many bytes, and less waiting."""
    tree = to_tree(model_of("dense", 4, assignment="zigzag").config)
    one, two = (Model(convert(Config, tree | {"train": {"batch": 4, "micro_batches": count}})) for count in (1, 2))
    assert two.flops == pytest.approx(one.flops)
    network = lines(4, "20 Mbit/s", "link")
    whole, halves = one.simulate(COSTS, network), two.simulate(COSTS, network)
    assert halves.sent_bytes.sum() == pytest.approx(whole.sent_bytes.sum(), rel=0.01)
    assert halves.waited_s.max() < 0.5 * whole.waited_s.max()
    assert halves.step_s < whole.step_s - 0.1


def test_waits_are_by_layer_and_direction() -> None:
    """Only the layer that exchanges waits: the first node for gradients, the last for payloads."""
    tree = to_tree(small_config("dense", model={"context": 1024}, remote_last_layers=1))
    tree["coordinator"]["nodes"] = 2
    waits_s = Model(convert(Config, tree)).simulate(COSTS, lines(2, "5 Mbit/s", "link")).waits_s
    assert waits_s.shape == (2, 3, 2)
    assert np.argwhere(waits_s).tolist() == [[0, 2, 1], [1, 2, 0]]


def test_theta_of_the_chunk_before_crosses_borders_too() -> None:
    tree = to_tree(small_config("subspace", theta="previous"))
    tree["coordinator"]["nodes"] = 2
    model = Model(convert(Config, tree))
    outcome = model.simulate(COSTS, lines(2, "1 Gbit/s", "link"))
    assignment = model.config.assignment()
    sent = [step_bytes(model.payload, assignment, rank, model.spec).total for rank in range(2)]
    assert outcome.sent_bytes.sum(1).tolist() == sent
    plain = model_of("subspace", 2).simulate(COSTS, lines(2, "1 Gbit/s", "link"))
    assert outcome.waited_s[1] > 0 < plain.waited_s.sum()


def test_a_step_that_is_all_wire_is_its_bytes_over_the_rate() -> None:
    """Two nodes, hardly any compute: a payload a layer there, one back; each waits for the other's."""
    model = model_of("dense", 2)
    network = lines(2, "1 Mbit/s", "link", latency="0 ms")
    outcome = model.simulate(Costs(flops_per_s=1e15), network)
    bits = 8 * outcome.sent_bytes
    assert outcome.step_s == pytest.approx((bits[0, 1] + bits[1, 0]) / 1e6, rel=0.01)


@pytest.mark.parametrize(("ownership", "latencies"), [("contiguous", 2), ("zigzag", 6)])
def test_latency_counts_where_somebody_waits_for_it(ownership: str, latencies: int) -> None:
    """In contiguous order the owner that waits for nobody runs ahead, so all is there one latency later, and so are the
    gradients; where both read from each other, each of three layers waits, both ways."""
    model = model_of("subspace", 2, assignment=ownership)
    none, some = (
        model.simulate(Costs(flops_per_s=1e15), lines(2, "unlimited", "link", latency)).step_s
        for latency in ("0 ms", "50 ms")
    )
    assert some - none == pytest.approx(0.05 * latencies, rel=1e-3)


def test_faster_networks_and_devices_never_make_it_slower() -> None:
    model = model_of("dense", 4)
    steps = [model.step_s(COSTS, lines(4, f"{mbps} Mbit/s", "nic")) for mbps in (1, 3, 10, 30, 100, 1000)]
    assert steps == sorted(steps, reverse=True)
    assert model.step_s(COSTS.slowed(0.5), lines(4, "10 Mbit/s", "nic")) < steps[2]


def test_nodes_are_slowed_by_those_that_compute_at_the_same_time() -> None:
    """Two cores: three at once have two thirds of one each; two, or one, have one."""
    spans = [np.array([[0.0, 4.0]]), np.array([[0.0, 1.0], [2.0, 4.0]]), np.array([[3.0, 5.0], [6.0, 6.0]])]
    slower = crowding(spans, 2)
    assert slower == pytest.approx([4 / (3 + 2 / 3), 3 / (2 + 2 / 3), 2 / (1 + 2 / 3)])
    assert crowding(spans, 1) == pytest.approx([4 / (1 / 2 + 1 + 1 / 2 + 1 / 3), 3 / (1 + 1 / 3), 2 / (1 + 1 / 3)])


@pytest.mark.parametrize("scope", ["link", "nic"])
def test_messages_cost_both_who_sends_and_who_receives(scope: str) -> None:
    model = model_of("dense", 4)
    network = lines(4, "50 Mbit/s", scope)
    message_s = 1e-3
    costs = Costs(flops_per_s=COSTS.flops_per_s, message_s=message_s)
    more = model.simulate(costs, network).busy_s - model.simulate(COSTS, network).busy_s
    # Two chunks a node, each to the nodes after; their gradients come back the same way.
    expected = [2 * len(model.step.layers) * 2 * (3 - rank + rank) * message_s for rank in range(4)]
    assert more == pytest.approx(expected)


def test_nodes_that_share_cores_get_no_more_than_those_cores() -> None:
    model = model_of("local", 4, assignment="zigzag")
    network = lines(4, "1 Gbit/s", "link")
    alone = model.simulate(COSTS, network)
    shared = model.simulate(Costs(flops_per_s=COSTS.flops_per_s, cores=2), network)
    assert shared.step_s == pytest.approx(alone.busy_s.sum() / 2, rel=0.02)


def test_a_million_tokens_on_64_nodes_need_no_event_for_each_message() -> None:
    """64 nodes × 2,016 pairs × 32 layers, both ways; the last node's compute bounds it below."""
    settings = ["--coordinator.nodes=64", "--model.chunks=64", "--model.context=1048576", "--model.layers=32"]
    config = load_config(PAPER, ["--coordinator.address=tcp://127.0.0.1:0", *settings])
    model, network = Model(config), lines(64, "300 Mbit/s", "link")
    outcome = model.simulate(Costs(flops_per_s=1e14), network)
    assert (outcome.sent_bytes > 0).sum() == 64 * 63
    assert outcome.busy_s.argmax() == 63
    assert outcome.busy_s.max() < outcome.step_s < outcome.busy_s.max() + (8 * outcome.sent_bytes / 3e8).sum(1).max()
