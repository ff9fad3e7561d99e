"""Figures of a plan that can be known otherwise: parameters, FLOPs, averaging, memory, bandwidth; and the command."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from helpers import ROOT
from helpers.small import VOCAB, small_config, small_model
from helpers.worlds import logits_of

from coordinator import ring
from coordinator.assignment import assign, share_out
from netem.config import convert
from netem.errors import ConfigError
from netem.network import Pair, Profile
from netem.profile import NetConfig, builtin_names, resolve
from node.cli import main
from node.commands.plan import TOO_LARGE
from node.config import Config, load_config, to_tree
from node.config.run import RunConfig
from node.exchange.chunks import ChunkExchange
from node.exchange.passes import PassSpec
from node.lab.plan.averaging import averaging_bytes, averaging_s
from node.lab.plan.compare import over_bandwidth, with_nodes
from node.lab.plan.costs import Costs, stated
from node.lab.plan.lines import in_order, lines_of, shared_service
from node.lab.plan.memory import shortfall, tightest
from node.lab.plan.model import Model
from node.lab.plan.predict import needed_bps, predict, unlimited
from node.lab.plan.text import describe
from node.lab.plan.work import VOCABULARY, head_work, layer_work, parameters
from node.measure.devices import DEVICES, device, devices
from node.train.from_config import payload_format
from node.train.head import RUN_TOKENS

TINY, PAPER = str(ROOT / "configs" / "tiny.toml"), ROOT / "configs" / "paper-800m.toml"
LOCAL = "--coordinator.address=tcp://127.0.0.1:0"


def nodes_of(config: Config, nodes: int, **net: str) -> Config:
    tree = to_tree(config)
    tree["coordinator"]["nodes"] = nodes
    tree["net"] |= {"profile": "internet-300mbps"} | net
    return convert(Config, tree)


def test_parameters_are_the_models_but_for_psi() -> None:
    config = small_config()
    model = small_model(config)
    psi = sum(codec.psi.numel() for _, codec in model.codecs() if codec.psi is not None)
    ours = parameters(config) - (VOCABULARY["gpt2"] - VOCAB) * config.model.d_model
    assert ours == sum(parameter.numel() for parameter in model.parameters()) - psi


def test_flops_are_those_that_torch_counts() -> None:
    """Forward of one node in a mode without codecs, counted by torch: products and attention. Torch counts the whole
    square of the causal block, so half of it is added here."""
    from torch.utils.flop_counter import FlopCounterMode

    config = small_config("dense", model={"context": 256})
    model, payload = small_model(config), payload_format(config)
    spec = PassSpec(config.model.chunk_tokens, False)
    tokens = torch.zeros(config.model.chunks, config.train.batch, spec.tokens, dtype=torch.long)
    attention = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: (
            4 * q[0] * q[1] * q[2] * k[2] * q[3]
        )
    }
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=attention) as counter:
        logits_of(model, tokens, ChunkExchange(config.assignment(), 0, payload), spec)
    ours = sum(
        stage.total().flops[0]
        for layer in range(config.model.layers)
        for stage in layer_work(config, layer, spec, 0.0, 0.0).forward
    )
    head = head_work(config, spec)[0].flops[0] * VOCAB / VOCABULARY["gpt2"]
    own = layer_work(config, 0, spec, 0.0, 0.0).forward.own.flops[0]
    projection = 2 * tokens.numel() * config.model.d_model * config.model.heads * config.model.head_size
    causal = config.model.layers * (own - projection)
    assert ours + head + causal == pytest.approx(counter.get_total_flops(), rel=1e-9)


def test_the_ring_sends_what_the_averager_sends() -> None:
    assert averaging_bytes(1001, 4) == np.mean([ring.bytes_sent(1001, 4, 4, rank) for rank in range(4)])


def test_averaging_is_two_turns_of_the_model_round_the_ring() -> None:
    network = lines_of(resolve(NetConfig(profile="unshaped", rate="80 Mbit/s", latency="10 ms")), 4)
    assert averaging_s(10_000_000, network) == pytest.approx(2 * 3 / 4 * 4e7 / 1e7 + 0.010, rel=1e-3)
    assert averaging_s(100, network) == pytest.approx(6 * 0.010, rel=1e-2)  # nothing fills the time of flight
    assert averaging_s(100, lines_of(resolve(NetConfig()), 1)) == 0


def test_a_slow_link_in_the_ring_slows_all_of_it() -> None:
    pair = {"from": "node-1", "to": "node-2", "rate": "8 Mbit/s"}
    net = convert(NetConfig, {"profile": {"rate": "80 Mbit/s", "pairs": [pair]}})
    slow = averaging_s(1_000_000, lines_of(resolve(net), 4))
    even = averaging_s(1_000_000, lines_of(resolve(NetConfig(rate="80 Mbit/s", latency="0 ms")), 4))
    assert slow == pytest.approx(10 * even)


def test_equal_turns_end_together_and_what_comes_late_ends_late() -> None:
    def ends(starts: list[float], services_s: list[float]) -> list[float]:
        return shared_service(np.array(starts), np.array(services_s)).tolist()

    assert ends([0.0, 0.0, 0.0], [1.0, 1.0, 1.0]) == [3.0, 3.0, 3.0]
    assert ends([0.0, 0.5], [1.0, 1.0]) == [1.5, 2.0]
    assert ends([0.0, 5.0], [1.0, 1.0]) == [1.0, 6.0]
    assert ends([0.0, 0.0, 1.0], [3.0, 1.0, 0.25]) == [4.25, 2.25, 1.75]


def test_a_receiving_nic_adds_nothing_to_one_sender_and_queues_two() -> None:
    one, free = in_order(np.array([1.0]), np.array([3.0]), 2.0, 0.0)
    assert one == pytest.approx([3.0])
    assert free == pytest.approx(3.0)
    two, free = in_order(np.array([1.0, 1.0]), np.array([3.0, 3.0]), 2.0, 0.0)
    assert two == pytest.approx([5.0, 5.0])
    assert free == pytest.approx(5.0)
    late, _ = in_order(np.array([1.0]), np.array([3.0]), 2.0, 4.0)
    assert late == pytest.approx([6.0])  # behind what was there before


@pytest.mark.parametrize("scope", ["link", "nic"])
def test_the_needed_bandwidth_gives_the_utilisation(scope: str) -> None:
    config = nodes_of(small_config(model={"context": 4096}), 4, scope=scope, latency="0 ms")
    model, costs, lines = Model(config), Costs(flops_per_s=1e9), lines_of(resolve(config.net), 4)
    free_s = model.simulate(costs, unlimited(lines)).step_s
    needed = needed_bps(model, costs, lines, free_s / 0.9)
    assert needed is not None
    assert free_s / model.step_s(costs, lines.scaled(needed / 300e6)) == pytest.approx(0.9, rel=0.01)


def test_no_bandwidth_makes_up_for_latency() -> None:
    config = nodes_of(small_config(), 4, latency="1 s")
    needs = predict(config, Costs(flops_per_s=1e9), devices("cpu", 4)).bandwidths
    assert [need.rate_bps for need in needs] == [None, None, None]


@pytest.mark.parametrize(
    ("net", "flops_per_s", "sync_every", "bottleneck"),
    [
        ({"rate": "1 Gbit/s"}, 1e7, 100, "compute"),
        ({"rate": "1 Mbit/s", "latency": "0 ms"}, 1e15, 1000000, "link node-"),
        ({"rate": "1 Mbit/s", "latency": "0 ms", "scope": "nic"}, 1e15, 1000000, "NIC of node-"),
        ({"rate": "unlimited", "latency": "1 s"}, 1e15, 1000000, "latency"),
        ({"rate": "1 Mbit/s", "latency": "0 ms"}, 1e9, 1, "averaging every step"),
    ],
)
def test_the_bottleneck_is_named(net: dict[str, str], flops_per_s: float, sync_every: int, bottleneck: str) -> None:
    tree = to_tree(nodes_of(small_config(), 2, **net))
    tree["train"]["sync_every"] = sync_every
    plan = predict(convert(Config, tree), Costs(flops_per_s=flops_per_s), devices("cpu", 2))
    assert plan.bottleneck.startswith(bottleneck)


def test_memory_of_the_papers_setting_is_near_what_it_reports() -> None:
    """38.4 GB a GPU there; here whole logits in float32 and unfused norms and products are counted, so it is more."""
    config = load_config(PAPER, [LOCAL])
    model = Model(config)
    needed = tightest(model, devices("a100", 8)).needed
    assert needed.weights + needed.gradients + needed.adam == 16 * parameters(config)
    assert 30e9 < needed.device < 60e9


def test_the_fullest_node_reads_the_most() -> None:
    config = nodes_of(small_config(), 4)
    model = Model(config)
    sizes = config.train.batch * config.model.chunk_tokens * 2 * config.model.d_kv * 4
    assert tightest(model, devices("cpu", 4)).needed.remote == 3 * config.model.layers * sizes


def test_memory_holds_all_passes() -> None:
    """The same contexts in one pass or two: each keeps its own, so the sum is the same."""
    tree = to_tree(nodes_of(small_config("dense"), 4))
    one, two = (convert(Config, tree | {"train": {"batch": 4, "micro_batches": count}}) for count in (1, 2))
    whole, halves = (
        tightest(model, devices("cpu", 4)).needed for config, model in ((one, Model(one)), (two, Model(two)))
    )
    assert halves == whole


def test_logits_are_those_of_one_run_where_gradients_are_computed_in_the_forward() -> None:
    tree = to_tree(small_config("dense", model={"context": 8192}))
    model = Model(convert(Config, tree))
    logits = tightest(model, devices("cpu", 1)).needed.logits
    vocabulary, width = VOCABULARY["gpt2"], model.config.model.d_model
    assert logits == RUN_TOKENS * vocabulary * 12 + (2 * 8192 + vocabulary) * width * 4
    assert model.step.head_backward.flops.sum() == 0
    short = Model(small_config("dense"))
    assert short.step.head_backward.flops.sum() == 2 * short.step.head_forward.flops.sum()


@pytest.mark.parametrize(("grad_format", "share"), [("same", 1.0), ("float32", 4.0)])
def test_gradients_within_a_budget_have_their_own_size(grad_format: str, share: float) -> None:
    """A number in int8 takes a byte, and each token's scale two."""
    settings = {"budget_bytes_per_token": 400.0, "generators": 1, "format": "int8", "grad_format": grad_format}
    model = Model(nodes_of(small_config("subspace", model={"d_model": 256}, **settings), 2))
    layer = next(iter(model.payload.ranks.layers))
    ratio = model.payload_bytes(layer, "grad") / model.payload_bytes(layer)
    assert ratio == pytest.approx(share, rel=0.1)


def test_with_recompute_a_layer_keeps_its_input_and_its_attention_s_output() -> None:
    """The same figures as in test_recompute, which counts what a forward holds; one layer has everything at a time."""
    plain = small_config()
    recomputed = msgspec.structs.replace(plain, run=RunConfig(recompute=True))
    needed, less = (tightest(Model(config), devices("cpu", 1)).needed for config in (plain, recomputed))
    model, tokens = plain.model, plain.train.batch * plain.model.context
    kept = 4 * tokens * (model.d_model + model.heads * model.head_size + model.heads)
    assert less.activations == model.layers * kept + needed.activations / model.layers
    assert less.remote == needed.remote / model.layers
    assert less.payloads == needed.payloads


def test_curves_keep_chunks_a_node_and_leave_out_what_does_not_divide() -> None:
    config = nodes_of(small_config(model={"context": 96}), 2)
    curves = over_bandwidth(config, Costs(flops_per_s=1e9), nodes=(2, 4, 5, 8), rates_bps=(1e6, 1e9))
    assert [curve.nodes for curve in curves] == [2, 4, 8]
    assert all(curve.tokens_per_s[0] < curve.tokens_per_s[1] for curve in curves)
    more = with_nodes(config, 8)
    assert more is not None
    assert more.model.chunks == 16


def test_devices_are_what_their_names_say() -> None:
    assert all(name == one.name for name, one in DEVICES.items())
    assert stated(device("a100"), 0.4).flops_per_s == pytest.approx(124.8e12)


def test_the_command_prints_a_plan_and_what_it_assumes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "plan.png"
    arguments = ["plan", str(PAPER), "--nodes", "8", "--device", "h100", "--net", "internet-300mbps"]
    assert main([*arguments, "--contexts", "65536", "--png", str(picture)]) == 0
    text = capsys.readouterr().out
    for words in (
        "tokens/s",
        "bottleneck:",
        "MFU 0.4, assumed; device h100",
        "| node-7",
        "| 65,536",
        "| 64 nodes",
        "assumed:",
    ):
        assert words in text
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_json_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", TINY, "--device", "cpu", "--mfu", "0.1", "--json", "--compress.mode", "dense"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["tokens_per_s"] == pytest.approx(plan["tokens"] / plan["step_s"])
    assert [need["utilisation"] for need in plan["bandwidths"]] == [0.5, 0.9, 0.95]
    assert plan["costs"]["flops_per_s"] == pytest.approx(1e10)
    assert plan["assumes"]


def test_a_plan_that_does_not_fit_has_an_exit_code_and_a_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", str(PAPER), "--nodes", "2", "--device", "4090", "--contexts", "8192"]
    assert main(arguments) == TOO_LARGE == 3
    text = capsys.readouterr().out
    (line,) = (line for line in text.splitlines() if line.startswith("too large:"))
    assert "GB and has 24 GB; take more nodes" in line
    assert text.count("does not fit") == 0  # the shorter context does
    assert main([*arguments, "--json"]) == TOO_LARGE
    assert json.loads(capsys.readouterr().out)["fits"] is False
    assert main(["plan", str(PAPER), "--nodes", "8", "--contexts", "1048576"]) == 0
    text = capsys.readouterr().out
    assert "too large:" not in text
    assert text.count("does not fit") == 1


@pytest.mark.parametrize("profile", builtin_names())
def test_every_profile_that_comes_along_can_be_planned(profile: str) -> None:
    plan = predict(nodes_of(small_config(), 4, profile=profile), Costs(flops_per_s=1e9), devices("cpu", 4))
    assert 0 < plan.free_s <= plan.exchange_step_s <= plan.step_s
    assert 0 < plan.utilisation <= 1


@pytest.mark.parametrize("nodes", [1, 2, 4])
@pytest.mark.parametrize("setting", [{"mode": "local"}, {"budget_bytes_per_token": 400.0}, {"remote_last_layers": 2}])
def test_every_mode_can_be_planned(nodes: int, setting: dict[str, object]) -> None:
    config = nodes_of(small_config(**{"mode": "subspace", "generators": 1} | setting), nodes)  # type: ignore[arg-type]
    plan = predict(config, Costs(flops_per_s=1e9), devices("cpu", nodes))
    sent = sum(map(sum, plan.sent_bytes))
    assert (sent > 0) == (nodes > 1 and config.compress.mode != "local")
    assert len(plan.bandwidths) == (3 if nodes > 1 else 0)
    assert describe(plan)


def test_a_link_that_is_cut_ends_no_step() -> None:
    profile = Profile(name="cut", rate_bps=1e6, pairs=(Pair("node-0", "node-1", True, 0.0),))
    with pytest.raises(ConfigError, match="cut has a link that is cut"):
        lines_of(profile, 2)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "CONFIG: give a TOML file"),
        ([TINY, "--device", "abacus"], "--device abacus: no such device; there are a100"),
        ([TINY, "--mfu", "40"], "--mfu 40: expected a share of the peak"),
        ([TINY, "--nodes", "5"], "coordinator.nodes = 5: more nodes than chunks (4)"),
        ([TINY, "--net", "pigeon"], "net.profile = 'pigeon': no such profile"),
        ([TINY, "--contexts", "130"], "model.context = 130: does not divide"),
        ([TINY, "--fit", "none.jsonl"], "none.jsonl"),
        ([TINY, "--fit", TINY], f"{TINY}/metrics.jsonl: no such file"),
        ([TINY, "--fit", "none.jsonl", "--mfu", "0.4"], "--mfu: a fit to runs takes its place"),
        ([TINY, "--validate", "runs"], "--validate: takes folders of runs"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert expected in captured.err
    assert len(captured.err.splitlines()) == 1


@pytest.mark.parametrize("mode", ["contiguous", "zigzag"])
def test_a_node_that_takes_over_too_many_chunks_is_told_with_the_figures(mode: str) -> None:
    config = convert(
        Config,
        {
            "model": {"layers": 4, "d_model": 512, "heads": 8, "context": 65536, "chunks": 8},
            "coordinator": {"nodes": 4, "assignment": mode},
        },
    )
    all_there, two_left = assign(8, 4, mode), assign(8, 2, mode)
    needed = [
        float(shortfall(config, 1.0, shares, 0).split("about ")[1].split(" GB")[0]) for shares in (all_there, two_left)
    ]
    assert needed[0] < needed[1] < 3 * needed[0]
    limit_bytes = 1e9 * sum(needed) / 2
    assert shortfall(config, limit_bytes, all_there, 0) == ""
    assert shortfall(config, limit_bytes, two_left, 0).startswith("4 of 8 chunks need about ")
    assert shortfall(config, limit_bytes, share_out(all_there, mode, [1, 3]), 1) != ""  # type: ignore[arg-type]
