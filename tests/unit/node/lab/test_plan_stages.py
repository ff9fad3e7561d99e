"""Plans of nodes with several devices: against a simulation segment by segment, the wire's formula, and by hand."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from helpers.fake_wire import lane_of, message
from helpers.small import VOCAB, small_config, small_model
from helpers.stage_oracle import actions, staged_ends_s
from helpers.worlds import logits_of
from torch.distributed.pipelining.schedules import _get_1f1b_rank_ops

from netem.config import convert
from netem.errors import ConfigError
from netem.network import Profile
from netem.profile import NetConfig, resolve
from netem.shaper import Shaper
from node.config import Config, to_tree
from node.config.stages import stage_layers
from node.exchange.chunks import ChunkExchange
from node.exchange.passes import PassSpec
from node.exchange.payload import step_bytes
from node.lab.plan.costs import Costs
from node.lab.plan.events import Clock
from node.lab.plan.fluid import Network
from node.lab.plan.lines import Lines, lines_of
from node.lab.plan.memory import memory
from node.lab.plan.model import Model
from node.lab.plan.pipeline import simulate_stages
from node.lab.plan.predict import predict, unlimited
from node.lab.plan.simulate import BACKWARD, FORWARD
from node.lab.plan.stages import in_flight, order
from node.lab.plan.text import describe
from node.lab.plan.work import VOCABULARY, layer_parameters
from node.measure.devices import devices
from node.train.from_config import payload_format

COSTS = Costs(flops_per_s=2e9, inside_bps=1e9)


def config_of(mode: str = "dense", nodes: int = 2, stages: int = 2, shards: int = 1, **settings: object) -> Config:
    """Passes of one context each, four of them in each shard, through six layers."""
    tree = to_tree(small_config(mode, model={"context": 1024, "chunks": 8, "layers": 6, "tied": False}))
    tree["train"] |= {"batch": 4 * shards, "micro_batches": 4, "pipeline": settings.pop("pipeline", "1f1b")}
    tree["coordinator"] |= {"nodes": nodes, "stages": stages, "shards": shards} | settings
    return convert(Config, tree)


def lines(nodes: int, rate: str = "10 Mbit/s", scope: str = "link", latency: str = "2 ms") -> Lines:
    return lines_of(resolve(NetConfig(profile="unshaped", rate=rate, scope=scope, latency=latency)), nodes)  # type: ignore[arg-type]


@pytest.mark.parametrize("pipeline", ["1f1b", "gpipe"])
@pytest.mark.parametrize(
    ("nodes", "stages", "parts", "owners"),
    [
        (2, 2, 1, {}),
        (4, 3, 1, {}),
        (2, 4, 1, {"assignment": "zigzag"}),
        (3, 2, 1, {"chunks_per_node": [1, 2, 5]}),
        (4, 1, 2, {}),
        (4, 1, 4, {}),
        (4, 2, 2, {"assignment": "zigzag"}),
    ],
)
@pytest.mark.parametrize("scope", ["link", "nic"])
@pytest.mark.parametrize("rate", ["5 Mbit/s", "50 Mbit/s"])
@pytest.mark.parametrize("mode", ["subspace", "dense"])
def test_a_step_takes_what_it_takes_segment_by_segment(
    pipeline: str, nodes: int, stages: int, parts: int, owners: dict[str, object], scope: str, rate: str, mode: str
) -> None:
    model = Model(config_of(mode, nodes, stages, pipeline=pipeline, **owners), parts)
    network = lines(nodes, rate, scope)
    outcome = model.simulate(COSTS, network)
    expected = staged_ends_s(model.step, model.stages, COSTS, network)
    assert outcome.step_s == pytest.approx(max(expected), rel=0.02)


def test_messages_of_all_stages_share_the_nic_of_their_node() -> None:
    """Two flows of 1 MB at 8 Mbit/s: each alone would take a second."""
    clock, there = Clock(), {}
    network = Network(lines(3, "8 Mbit/s", "nic", "10 ms"), clock)
    for stage, target, nbytes in ((0, 1, 1e6), (1, 1, 1e6), (1, 2, 5e5)):
        network.send(0, target, stage, nbytes, 0.0, lambda now, key=(stage, target): there.setdefault(key, now))  # type: ignore[misc]
    clock.run()
    assert there == {(1, 2): pytest.approx(1.51), (0, 1): pytest.approx(2.51), (1, 1): pytest.approx(2.51)}


def test_a_receiving_nic_serves_in_order_of_arrival() -> None:
    """Two senders at 8 Mbit/s each, to one receiver of as much: what comes first is through first."""
    clock, there = Clock(), {}
    network = Network(lines(3, "8 Mbit/s", "nic", "0 ms"), clock)
    network.send(0, 2, 0, 1e6, 0.0, lambda now: there.setdefault("early", now))
    clock.at(0.5, lambda now: network.send(1, 2, 0, 1e6, now, lambda now: there.setdefault("late", now)))
    clock.run()
    assert there == {"early": pytest.approx(1.5), "late": pytest.approx(2.0)}


@pytest.mark.parametrize("passes", [4, 7])
@pytest.mark.parametrize("stages", [1, 2, 4])
def test_a_stage_computes_in_torch_s_order(passes: int, stages: int) -> None:
    """1F1B as torch.distributed.pipelining writes it down, with waits (None) between."""
    for stage in range(stages):
        ahead = stages - 1 - stage

        def here(_: int, stage: int = stage) -> int:
            return stage

        written = _get_1f1b_rank_ops(1, stages, ahead, passes - ahead, ahead, stage, here, here)
        ways = {"FORWARD": FORWARD, "FULL_BACKWARD": BACKWARD}
        expected = [(ways[op.computation_type.name], op.microbatch_index) for op in written if op is not None]
        assert order("1f1b", stage, stages, passes) == expected


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
@pytest.mark.parametrize(("stages", "passes"), [(1, 1), (2, 2), (4, 6), (4, 2)])
def test_no_stage_keeps_more_passes_than_is_planned(schedule: str, stages: int, passes: int) -> None:
    for stage in range(stages):
        kept = most = 0
        for way, _ in order(schedule, stage, stages, passes):  # type: ignore[arg-type]
            kept += 1 if way == FORWARD else -1
            most = max(most, kept)
        assert most == in_flight(schedule, stage, stages, passes)  # type: ignore[arg-type]


def test_without_a_network_and_with_equal_stages_bubbles_are_those_of_the_formula() -> None:
    """(S − 1) / (M + S − 1), of a forward and a backward each (one node; head and embedding cost nothing here)."""
    config = config_of("local", nodes=1, stages=3)
    model = Model(config)
    zero = model.step.head_forward._replace(flops=0 * model.step.head_forward.flops)
    step = model.step._replace(head_forward=zero, head_backward=zero)
    outcome = simulate_stages(step, model.stages, Costs(flops_per_s=2e9), lines(1))
    busy_s = outcome.devices_busy_s[0, 0]
    assert outcome.devices_busy_s == pytest.approx(busy_s)
    assert 1 - busy_s / outcome.step_s == pytest.approx(2 / (4 + 2))


@pytest.mark.parametrize("mode", ["subspace", "dense", "local"])
@pytest.mark.parametrize(("stages", "shards"), [(1, 1), (1, 2), (2, 1), (3, 2)])
@pytest.mark.parametrize("owners", [{}, {"assignment": "zigzag"}, {"relay": "always"}])
def test_the_bytes_are_those_of_the_wires_formula(
    mode: str, stages: int, shards: int, owners: dict[str, object]
) -> None:
    """Each column sends what a node without stages would send of the layers that it has; all of them, all layers."""
    model = Model(config_of(mode, 4, stages, shards, **owners))
    sent = model.simulate(COSTS, lines(4)).sent_bytes.sum(1)
    assignment = model.config.assignment()
    for rank in range(4):
        of_pass = step_bytes(model.payload, assignment, rank, model.spec, relays=model.step.relays).total
        assert sent[rank] == shards * 4 * of_pass


def test_between_nodes_a_boundary_is_its_bytes_each_way() -> None:
    model = Model(config_of("local", 4, 1), parts=4)
    sent = model.simulate(COSTS, lines(4)).sent_bytes
    config = model.config
    nbytes = config.train.batch * config.model.context * config.model.d_model * 2
    assert sent.tolist() == [[nbytes * (abs(one - other) == 1) for other in range(4)] for one in range(4)]


@pytest.mark.parametrize("mode", ["subspace", "dense"])
def test_one_stage_is_a_node_as_ever(mode: str) -> None:
    """One pass: then no turns are taken, and both simulations do the same."""
    tree = to_tree(config_of(mode, 4, 1))
    tree["train"] |= {"batch": 1, "micro_batches": 1}
    model = Model(convert(Config, tree))
    for rate in ("5 Mbit/s", "50 Mbit/s"):
        one, other = (
            model.simulate(COSTS, lines(4, rate)),
            simulate_stages(model.step, model.stages, COSTS, lines(4, rate)),
        )
        assert other.step_s == pytest.approx(one.step_s, rel=1e-6)
        assert other.sent_bytes.tolist() == one.sent_bytes.tolist()
        assert other.busy_s == pytest.approx(one.busy_s)


def test_shards_share_the_lines_and_the_contexts() -> None:
    """Twice the devices, each with half of the contexts, over the same lines: half the compute, as many bytes."""
    one, two = Model(config_of("dense", 2, 1, 2)), config_of("dense", 2, 1, 2)
    tree = to_tree(two)
    tree["coordinator"]["shards"] = 1
    alone = Model(convert(Config, tree))
    network = lines(2, "5 Mbit/s")
    assert one.flops == pytest.approx(alone.flops)
    both, single = one.simulate(COSTS, network), alone.simulate(COSTS, network)
    assert both.sent_bytes.sum() == pytest.approx(single.sent_bytes.sum(), rel=1e-3)
    assert both.busy_s == pytest.approx(single.busy_s / 2, rel=1e-2)
    assert single.step_s / 2 < both.step_s < single.step_s


def test_weights_that_come_slower_than_layers_compute_hold_them_up() -> None:
    model = Model(config_of("local", 1, 1, 2))
    slow, fast, free = (
        model.simulate(Costs(flops_per_s=2e9, inside_bps=rate), lines(1)).step_s for rate in (1e4, 1e12, 0)
    )
    bits = 8 * 4 * layer_parameters(model.config.model) / 2
    assert slow == pytest.approx(6 * 3 * bits / 1e4, rel=0.1)
    assert fast == free < slow / 2


def test_what_is_computed_again_is_what_torch_counts() -> None:
    """The products of a backward with `run.recompute`, over those without; attention is not computed again."""
    from torch.utils.flop_counter import FlopCounterMode

    counted, planned = [], []
    for recompute in (False, True):
        tree = to_tree(config_of("dense", 1, 1))
        tree["run"]["recompute"] = recompute
        config = convert(Config, tree)
        planned.append(Model(config).flops / config.train.batch)
        model, chunks = small_model(config), config.model.chunks
        tokens = torch.zeros(chunks, 1, config.model.chunk_tokens, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            exchange = ChunkExchange(config.assignment(), 0, payload_format(config))
            logits_of(model, tokens, exchange, PassSpec(config.model.chunk_tokens, False)).sum().backward()
        counted.append(counter.get_total_flops())
    assert planned[1] - planned[0] == pytest.approx(counted[1] - counted[0], rel=1e-9)


def test_stages_have_all_layers_one_after_the_other() -> None:
    assert stage_layers(6, 4) == (range(2), range(2, 4), range(4, 5), range(5, 6))
    assert stage_layers(6, 1) == (range(6),)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_devices_hold_what_their_modules_hold(stages: int, shards: int) -> None:
    """FSDP2 gives the first of three processes a third of the rows of every parameter, rounded up."""
    config = config_of("dense", 1, stages)
    model = small_model(config)

    def rows(module: torch.nn.Module) -> int:
        return sum(weight.chunk(shards)[0].numel() for weight in module.parameters())

    found = [sum(rows(model.layers[index]) for index in layers) for layers in stage_layers(6, stages)]
    found[0] += rows(model.embed_tokens)
    found[-1] += rows(model.norm) + rows(model.lm_head)
    ours = [held.of_shard(shards) for held in Model(config).stage_parameters]
    more = (-(-VOCABULARY["gpt2"] // shards) - -(-VOCAB // shards)) * config.model.d_model
    ours[0] -= more
    ours[-1] -= more
    assert ours == found


def test_nodes_that_share_cores_get_no_more_than_those_cores() -> None:
    model = Model(config_of("local", 2, 2, assignment="zigzag"))
    alone = model.simulate(COSTS, lines(2))
    costs = Costs(flops_per_s=COSTS.flops_per_s, cores=2)
    shared = model.simulate(costs, lines(2))
    assert shared.step_s >= alone.devices_busy_s.sum() / 2 * 0.98
    assert shared.step_s < alone.devices_busy_s.sum()


@pytest.mark.parametrize(
    ("stages", "shards", "words"), [(2, 1, "2 pipeline stages"), (1, 2, "2 shards"), (2, 2, "4 devices")]
)
def test_a_plan_says_what_a_node_is(stages: int, shards: int, words: str) -> None:
    config = config_of("subspace", 4, stages, shards)
    plan = predict(config, COSTS, devices("cpu", 4))
    assert words in describe(plan)
    assert (plan.bubbles > 0) == (plan.boundary_bytes > 0) == (stages > 1)
    assert (plan.memory.gathered > 0) == (shards > 1)
    assert (plan.memory.boundaries > 0) == (stages > 1)
    assert plan.free_s <= plan.exchange_step_s <= plan.step_s


def test_averaging_moves_the_whole_model_whoever_holds_it() -> None:
    """Each device averages its part with its column, all of them over the same lines."""
    whole, dealt = Model(config_of("dense", 4, 1)), Model(config_of("dense", 4, 2, 2))
    assert dealt.averaging_bytes() == pytest.approx(whole.averaging_bytes(), rel=1e-3)
    assert dealt.averaging_s(lines(4)) == pytest.approx(whole.averaging_s(lines(4)), rel=1e-3)


def test_memory_of_1f1b_is_that_of_the_passes_in_flight() -> None:
    early, late = Model(config_of("dense", 2, 2)), Model(config_of("dense", 2, 2, pipeline="gpipe"))
    (on,) = devices("cpu", 1)
    for stage, passes in ((0, 2), (1, 1)):
        assert memory(late, on, 1, stage).activations == 4 / passes * memory(early, on, 1, stage).activations
    assert memory(early, on, 0, 0).logits == 0 < memory(early, on, 0, 1).logits
    whole = memory(Model(config_of("dense", 2, 1)), on, 1)
    assert sum(memory(late, on, 1, stage).activations for stage in range(2)) == whole.activations


def test_free_lines_never_make_it_slower() -> None:
    model = Model(config_of("dense", 4, 2))
    steps = [model.step_s(COSTS, lines(4, f"{mbps} Mbit/s", "nic")) for mbps in (1, 3, 10, 30, 100, 1000)]
    assert steps == sorted(steps, reverse=True)
    assert model.simulate(COSTS, unlimited(lines(4))).step_s <= steps[-1]


def test_a_layout_that_no_batch_fits_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train\.batch = 4"):
        convert(Config, to_tree(config_of()) | {"coordinator": {"nodes": 2, "shards": 3}})


def test_the_oracle_takes_backwards_as_soon_as_it_may() -> None:
    stages = Model(config_of()).stages
    assert actions(stages, 1, 2) == [(True, 0), (False, 0), (True, 1), (False, 1)]
    assert np.array(actions(stages, 0, 3))[:, 0].tolist() == [1, 1, 0, 1, 0, 0]


@pytest.mark.parametrize("stages", [1, 2])
def test_a_nic_sends_when_netem_s_own_shaper_does(stages: int) -> None:
    """One layer's payloads of each stage to 63 readers, on 64 nodes, in turns of 64 KiB."""
    profile = Profile(scope="nic", rate_bps=3e8, latency_s=0.025, window_bytes=10**12)
    nbytes, readers = 1_000_000, [f"node-{rank}" for rank in range(1, 64)]
    shaper = Shaper("node-0", profile)
    lanes = {reader: lane_of(shaper, reader) for reader in readers}
    clock, planned = Clock(), {}
    network = Network(lines_of(profile, 64), clock)
    for stage in range(stages):
        for target, reader in enumerate(readers, 1):
            lanes[reader].enqueue(message(nbytes, str((stage, target)).encode(), flow=stage))
            comes = partial(planned.setdefault, (stage, target))
            network.send(0, target, stage, float(nbytes), 0.0, comes)
    clock.run()
    now, shaped = 0.0, {}
    while now < np.inf:
        for arrival, _, segment in shaper.poll(now):
            if segment.last:
                shaped[segment.message.tag.decode()] = arrival  # type: ignore[union-attr]
        now = shaper.next_time()
    turn_s = 63 * stages * 8 * 65_600 / 3e8
    assert {str(key): pytest.approx(there_s, rel=0.002, abs=turn_s) for key, there_s in planned.items()} == shaped
    assert max(shaped.values()) == pytest.approx(max(planned.values()), rel=0.002)


def test_with_too_many_messages_nothing_is_searched_for(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of("dense", 4, 2)
    plan = predict(config, COSTS, devices("cpu", 4))
    assert plan.messages == 2 * 4 * 6 * 6 * 2  # both ways, passes, layers, pairs, chunks of a node
    assert [way.parts for way in plan.across] == [2]  # four groups would have more stages than layers
    assert "groups of 2" in describe(plan)
    monkeypatch.setattr("node.lab.plan.predict.MOST_MESSAGES", plan.messages - 1)
    monkeypatch.setattr("node.lab.plan.text.MOST_MESSAGES", plan.messages - 1)
    plan = predict(config, COSTS, devices("cpu", 4))
    assert plan.bandwidths == plan.across == ()
    assert "a search would take too long" in describe(plan)
