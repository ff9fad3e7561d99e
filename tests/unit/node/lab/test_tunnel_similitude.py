"""Similitude: what must not change under scaling does not, and a tunnel has the numbers of its target."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers.tunnel_runs import A100, HERE, bench_of_work, target
from hypothesis import given
from hypothesis import strategies as st

from netem.errors import ConfigError
from netem.profile import NetConfig, builtin_names, resolve
from node.lab.plan.averaging import averaging_s
from node.lab.plan.costs import Costs
from node.lab.plan.lines import Lines, lines_of
from node.lab.plan.model import Model
from node.lab.tunnel.bench_node import mode_of
from node.lab.tunnel.design import design, first_design, goal
from node.lab.tunnel.network import profile_toml, scaled, target_profile
from node.lab.tunnel.similitude import COMPRESSED, WHOLE, Kind, Scale, body_of, numbers, similar, similar_sync, wire_s
from node.lab.tunnel.small import MODES, Mode, small_config

STEADY = [name for name in builtin_names() if name not in ("lte-drive", "unshaped")]
FACTORS = st.floats(1e-3, 1e3)
MODEL = Model(target())
BODY = body_of(MODEL, A100)
LINES = lines_of(resolve(NetConfig()), 4)
COMPRESSING, UNCOMPRESSED = MODES[1], MODES[2]


def faster(lines: Lines, factor: float) -> Lines:
    return lines.scaled(factor)._replace(latency_s=lines.latency_s / factor)


@given(FACTORS)
def test_a_device_and_a_network_that_are_as_much_faster_change_nothing(factor: float) -> None:
    had = numbers(BODY, LINES, 200).compared()
    assert numbers(BODY.slowed(1 / factor), faster(LINES, factor), 200).compared() == pytest.approx(had)


@given(FACTORS)
def test_the_target_in_its_own_tunnel_is_itself(factor: float) -> None:
    assert similar(BODY, BODY, LINES) == pytest.approx(Scale(1, 1, 1))
    assert similar(BODY, BODY.slowed(factor), LINES) == pytest.approx(Scale(1 / factor, 1 / factor, 1))


@given(FACTORS, st.floats(0.1, 10), st.floats(0.1, 10))
def test_what_one_rate_cannot_keep_is_shared_out(slower: float, forward: float, fewer: float) -> None:
    small = BODY.slowed(slower)
    odd = small.kinds[COMPRESSED]
    odd = odd._replace(forward_s=odd.forward_s * forward, payload_bytes=odd.payload_bytes * fewer)
    small = small._replace(kinds={**small.kinds, COMPRESSED: odd})
    had = numbers(small, similar(BODY, small, LINES).lines(LINES), 200)
    wanted = numbers(BODY, LINES, 200)
    off = {name: np.log(had.kinds[name].both / wanted.kinds[name].both) for name in wanted.kinds}
    assert off[COMPRESSED] == pytest.approx(-off[WHOLE], abs=1e-9)
    assert had.latency == pytest.approx(wanted.latency)


@given(st.floats(1e-3, 1), FACTORS, st.floats(1, 2))
def test_steps_between_averagings_give_its_share(share: float, slower: float, longer: float) -> None:
    body = BODY.slowed(slower)
    every = similar_sync(share, body, LINES, longer)
    exact = averaging_s(body.parameters, LINES, body.averages_in) * longer / (share * body.step_s)
    assert every == max(2, round(exact))


@pytest.mark.parametrize("net", STEADY)
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_on_the_profile_as_written_a_slow_copy_of_the_target_takes_as_much_longer(
    net: str, mode: Mode, tmp_path: Path
) -> None:
    """The planner's simulation, waits and overlap and all, sees the same step on another clock."""
    config = target(net=net)
    one = goal(config, mode, A100)
    model = Model(one.config)
    slow = A100.slowed(37.0)
    made = design(one, body_of(model, slow))
    path = tmp_path / "tunnel.toml"
    path.write_text(profile_toml(made.profile, "two\nlines"), encoding="utf-8")
    lines = lines_of(resolve(NetConfig(profile=str(path))), 4)
    assert model.simulate(slow, lines).step_s == pytest.approx(37 * model.simulate(A100, one.lines).step_s, rel=1e-3)
    assert made.sync_every == 200
    assert path.read_text(encoding="utf-8").startswith("# two\n# lines\n")


@pytest.mark.parametrize("net", STEADY)
def test_a_profile_scaled_by_one_is_read_back_as_it_was(net: str, tmp_path: Path) -> None:
    profile = target_profile(NetConfig(profile=net))
    path = tmp_path / "tunnel.toml"
    path.write_text(profile_toml(scaled(profile, Scale(1, 1, 1)), ""), encoding="utf-8")
    again = resolve(NetConfig(profile=str(path)))
    assert again.loss == pytest.approx(profile.loss)
    for source, goes_to in (("node-0", "node-1"), ("node-1", "node-2"), ("node-3", "node-0")):
        one, other = profile.link(source, goes_to), again.link(source, goes_to)
        assert (one.rate_bps or 0, one.latency_s, one.jitter_s) == pytest.approx(
            (other.rate_bps or 0, other.latency_s, other.jitter_s)
        )
        assert profile.pair_bps(source, goes_to) == again.pair_bps(source, goes_to)


@pytest.mark.parametrize(("settings", "payloads"), [((), 2), (("--net.scope=nic",), 6)])
def test_communication_is_what_the_busiest_line_carries(settings: tuple[str, ...], payloads: int) -> None:
    """Eight chunks on four nodes: a link of the first node carries both its chunks; its NIC, to three others."""
    lines = lines_of(resolve(target(*settings).net), 4)
    kind = Kind(1, payload_bytes=1e6, grad_bytes=5e5, forward_s=1.0, backward_s=1.0)
    once_s = payloads * 8e6 / 3e8
    assert wire_s(BODY.assignment, kind, lines) == pytest.approx((once_s, once_s / 2))


def test_a_small_model_of_its_own_shape_has_the_targets_numbers() -> None:
    config = target()
    small = mode_of(small_config(config, None, 12, Path("out")), "dense")
    one = goal(config, UNCOMPRESSED, A100)
    body = body_of(Model(small), HERE)
    made = design(one, body)
    compared = made.numbers.compared()
    assert compared.pop("averaging") == pytest.approx(one.numbers.averaging, rel=0.02)
    assert compared == pytest.approx({name: one.numbers.compared()[name] for name in compared})


def test_the_cores_are_fullest_where_no_network_holds_anybody_back() -> None:
    config = target(nodes=8)
    wide, narrow = goal(config, MODES[0], A100), goal(config, UNCOMPRESSED, A100)
    small = mode_of(small_config(config, None, 12, Path("out")), "dense")
    bench = bench_of_work(small, crowding=3.0)
    slow, fast = (first_design(one, bench, small, 2).body.step_s for one in (wide, narrow))
    assert bench.body.step_s <= fast < slow <= 3 * bench.body.step_s
    assert slow > 2.5 * bench.body.step_s
    alone = first_design(wide, bench, small, 8).body.step_s
    assert alone == pytest.approx(3 * bench.body.step_s)  # cores enough, and yet slower: what was measured holds


@pytest.mark.parametrize(
    ("net", "expected"),
    [
        (NetConfig(dilation=2.0), "net.dilation = 2.0: the tunnel sets it"),
        (NetConfig(window="1 MB"), "net.window = '1 MB': the tunnel sets it"),
        (NetConfig(profile="unshaped"), "--net unshaped: has no rate"),
        (NetConfig(profile="lte-drive"), "--net lte-drive: changes over time"),
    ],
)
def test_networks_without_one_number_are_refused(net: NetConfig, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        target_profile(net)


def test_costs_of_the_target_are_those_of_its_flops() -> None:
    """All that a step computes is layers, head and optimizer; at MFU 1 it is FLOPs over the peak."""
    peak = Costs(flops_per_s=1.0)
    body = body_of(MODEL, peak)
    busy_s = MODEL.simulate(peak, LINES.scaled(np.inf)).busy_s
    assert body.step_s == pytest.approx(busy_s.max())
    assert sum(kind.layers for kind in body.kinds.values()) == 8


TWO_PASSES = ("--train.batch=4", "--train.micro_batches=2")


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_a_node_with_stages_is_taken_for_one_device_that_is_as_much_faster(mode: Mode) -> None:
    """Its stages compute at the same time, and their payloads share the node's lines; bubbles are in the step."""
    plain, staged = (goal(target(*TWO_PASSES, *more), mode, A100) for more in ((), ("--coordinator.stages=2",)))
    for name, kind in plain.body.kinds.items():
        found = staged.body.kinds[name]
        assert (found.layers, found.payload_bytes, found.grad_bytes) == (
            kind.layers,
            kind.payload_bytes,
            kind.grad_bytes,
        )
        assert (2 * found.forward_s, 2 * found.backward_s) == pytest.approx((kind.forward_s, kind.backward_s))
    assert plain.body.step_s / 2 < staged.body.step_s < plain.body.step_s
    assert staged.numbers.latency == pytest.approx(2 * plain.numbers.latency)


def test_a_node_with_shards_sends_for_all_of_them() -> None:
    plain, sharded = (goal(target(*TWO_PASSES, *more), COMPRESSING, A100) for more in ((), ("--coordinator.shards=2",)))
    for name, kind in plain.body.kinds.items():
        found = sharded.body.kinds[name]
        assert found.payload_bytes == pytest.approx(kind.payload_bytes, rel=1e-3)
        assert 2 * found.forward_s == pytest.approx(kind.forward_s, rel=1e-3)
    small = small_config(target(*TWO_PASSES, "--coordinator.shards=2"), None, 12, Path("out"))
    assert (small.train.batch, small.coordinator.layout.columns) == (2, 1)
