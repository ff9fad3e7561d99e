"""The figures of the live view, computed without a terminal, and what it shows with and without one."""

from __future__ import annotations

import io
import subprocess
import sys
from typing import Any

import pytest
from rich.console import Console

from coordinator.records import rates
from netem.config import convert
from netem.profile import Profile
from node.config import Config
from node.watch.view import PLAIN_INTERVAL_S, View, describe_profile, format_duration, subtitle, title


def node(**changes: float) -> dict[str, float]:
    values = {
        "tokens": 256.0,
        "step_s": 2.0,
        "exposed_s": 0.5,
        "averaging_s": 0.0,
        "barrier_s": 0.2,
        "memory_peak_bytes": 450e6,
        "compressed_bytes": 4_000.0,
        "dense_bytes": 100_000.0,
        "averaging_bytes": 0.0,
        "uncompressed_bytes": 200_000.0,
        "replaced_bytes": 100_000.0,
        "sent_wire_bytes": 125_000.0,
        "cpu_percent": 50.0,
        "rss_bytes": 400e6,
    }
    return values | changes


def record(step: int, time: float | None = None, nodes: dict[str, Any] | None = None, **top: Any) -> dict[str, Any]:
    """A line of metrics.jsonl, one step every 2 s, two nodes of which one waits for nobody."""
    nodes = {"node-0": node(), "node-1": node(exposed_s=0.1)} if nodes is None else nodes
    summed = {key: sum(values.get(key, 0.0) for values in nodes.values()) for key in node()}
    return {
        "step": step,
        "time": 1000.0 + 2 * step if time is None else time,
        "loss": 5.0,
        **summed,
        "step_s": 2.0,
        "exposed_s": 0.5,
        "nodes": nodes,
        **top,
    }


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


# Figures.


def test_rates_are_over_wall_time() -> None:
    records = [record(1, 1000.0), record(2, 1005.0), record(3, 1010.0)]  # the step alone, then 5 s each with waits
    assert rates.durations_s(records) == [2.0, 5.0, 5.0]
    assert rates.tokens_per_s(records) == pytest.approx(3 * 512 / 12)
    assert rates.sent_bps(records, "node-1") == pytest.approx(3 * 8 * 125_000 / 12)
    assert rates.sent_bps(records) == pytest.approx(2 * 3 * 8 * 125_000 / 12)
    assert rates.eta_s(records, steps=13) == pytest.approx(10 * 4.0)


def test_a_pause_between_two_sessions_is_not_training_time() -> None:
    stopped_for_an_hour = [record(1, 1000.0), record(2, 1002.0), record(3, 4602.0)]
    assert rates.durations_s(stopped_for_an_hour) == [2.0, 2.0, 2.0]
    went_back = [record(7, 1000.0), record(3, 1009.0)]
    assert rates.durations_s(went_back) == [2.0, 2.0]


def test_the_remaining_time_is_never_negative_and_unknown_without_times() -> None:
    assert rates.eta_s([record(9)], steps=5) == 0.0
    assert rates.eta_s([{"step": 9}], steps=12) is None


def test_shares_are_means_over_nodes() -> None:
    assert rates.time_share([record(1), record(2)], "exposed_s") == pytest.approx((0.5 + 0.1) / (2 * 2.0))
    assert rates.time_share([{"exposed_s": 1.0, "step_s": 4.0}], "exposed_s") == 0.25
    assert rates.time_share([{}], "exposed_s") is None


def test_compression_with_and_without_the_layers_that_are_sent_as_they_are() -> None:
    saved = rates.compression([record(1)])
    assert saved is not None
    assert saved.all_layers == pytest.approx(1 - 104 / 200)
    assert saved.compressed_layers == pytest.approx(1 - 4 / 100)


def test_the_warm_start_does_not_dilute_compression() -> None:
    dense = {"n": node(compressed_bytes=0.0, dense_bytes=200_000.0, replaced_bytes=0.0)}
    assert rates.compression([record(1, nodes=dense)]) == (0.0, None)
    assert rates.compression([record(1, nodes=dense), record(2)]) == rates.compression([record(2)])
    assert rates.saved_in_all_steps([record(1, nodes=dense), record(2)]) == pytest.approx(1 - (200 + 2 * 104) / 600)
    assert rates.saved_in_all_steps([{"step": 1}]) is None
    assert rates.compression([{"step": 1}]) is None


def test_steps_at_full_context_are_those_with_most_tokens() -> None:
    short, full = record(1, tokens=128.0), record(2, tokens=512.0)
    assert rates.full_context([short, full, short]) == [full]
    assert rates.full_context([{}]) == []


def test_missing_and_null_values_count_as_nothing() -> None:
    assert rates.number({"loss": None}, "loss") == 0.0
    assert rates.number({"loss": float("nan")}, "loss") == 0.0
    assert rates.total([{"nodes": {"a": {"tokens": 3.0}}}, {}, {"nodes": {"b": {}}}], "tokens", "a") == 3.0
    assert rates.node_names([{"nodes": {"node-10": {}, "node-9": {}, "zoe": {}}}]) == ["node-9", "node-10", "zoe"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "–"), (0.2, "0:00"), (59.7, "1:00"), (123, "2:03"), (3723, "1:02:03")]
)
def test_durations(seconds: float | None, text: str) -> None:
    assert format_duration(seconds) == text


def test_an_unshaped_network_is_not_called_emulated() -> None:
    assert not describe_profile(Profile()).startswith("emulated")
    assert describe_profile(Profile(name="slow", rate_bps=1e6)).startswith("emulated slow (1 Mbit/s for each link")
    assert describe_profile(Profile(latency_s=0.01)).startswith("emulated")


# What is shown.


def shown(*records: dict[str, Any], config: Config | None = None, width: int = 120) -> str:
    console = Console(record=True, width=width, file=io.StringIO())
    view = View(config or Config(), console=console, clock=Clock())
    for entry in records:
        view.feed(entry)
    console.print(view.render())
    return console.export_text()


def test_before_the_first_step_the_panel_says_what_is_awaited() -> None:
    text = shown()
    assert "1 node starting" in text
    assert "emulated internet-300mbps" in text


def test_under_time_dilation_the_panel_has_both_speeds() -> None:
    records = [record(step) for step in range(98, 101)]
    text = shown(*records, config=convert(Config, {"net": {"dilation": 4.0}}), width=140)
    assert "emulated tokens/s" in text
    assert "1,024" in text
    assert "emulated tokens/s" not in shown(*records)


def test_the_panel_has_the_run_its_figures_and_a_row_for_each_node() -> None:
    text = shown(*[record(step) for step in range(98, 101)], record(101, heldout_loss=5.25))
    for part in ("step 101 of 300", "5.000", "held-out, 101", "5.250", "compression", "96.0 %", "6:38 to go"):
        assert part in text
    (row,) = [line for line in text.splitlines() if "node-1" in line]
    for part in ("500 KB", "0.5 Mbit/s", "104 KB", "0.10 s", "50 %", "400 MB"):
        assert part in row


def test_the_warm_start_is_named() -> None:
    assert "warm start, uncompressed" in shown(record(Config().compress.warmup_steps))
    assert "warm start" not in shown(record(Config().compress.warmup_steps + 1))


def test_what_is_unplugged_is_named() -> None:
    config = convert(Config, {"compress": {"unplug_step": 100}})
    out = io.StringIO()
    with View(config, console=Console(file=out), clock=Clock()) as view:
        for step in (100, 101):
            view.feed(record(step))
            assert ("unplugged, uncompressed" in view.line()) == (step == 101)
            assert "warm start" not in view.line()


def test_layers_that_see_far_are_named() -> None:
    one = {"remote_last_layers": 1, "dense_last_layers": 0}
    assert "V −95%, only the last layer sees far ·" in subtitle(convert(Config, {"compress": one}))
    assert "only the last 2 layers see far" in subtitle(convert(Config, {"compress": {"remote_last_layers": 2}}))
    assert "see" not in subtitle(convert(Config, {"compress": one | {"mode": "local"}}))


def test_records_with_hardly_anything_in_them_are_shown() -> None:
    text = shown({"step": 1}, {"step": 2, "nodes": {"a": {}, "b": {"loss_sum": None}}}, {"step": 3, "loss": None})
    assert "step 3 of 300" in text
    assert "–" in text


def test_a_node_that_no_longer_reports_keeps_its_row() -> None:
    text = shown(record(1), record(2, nodes={"node-0": node()}))
    assert any("node-1" in line and "–" in line for line in text.splitlines())


def test_without_a_terminal_there_is_a_plain_line_now_and_then_and_one_at_the_end() -> None:
    clock, out = Clock(), io.StringIO()
    with View(Config(), console=Console(file=out, width=40), clock=clock) as view:
        view.tick()
        for step in range(1, 12):
            view.feed(record(step))
            clock.now_s += 1.0
            view.tick()
    first, *lines = out.getvalue().splitlines()
    assert first == f"{title(Config())}: {subtitle(Config())}"
    assert [line.partition("/")[0] for line in lines] == ["step 1", "step 5", "step 10", "step 11"]
    assert PLAIN_INTERVAL_S == 5.0
    assert "\x1b" not in out.getvalue()


def test_on_a_terminal_the_panel_is_redrawn_and_stays() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100, _environ={"TERM": "xterm"})
    with View(Config(), console=console, clock=Clock()) as view:
        view.feed(record(1))
    assert "step 1" in out.getvalue()
    assert "node-1" in out.getvalue()


def test_view_and_report_do_not_import_torch() -> None:
    code = "import sys, node.watch.view, node.watch.recorded, node.watch.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_the_last_change_of_the_network_is_shown_and_stays() -> None:
    view = View(Config(), console=Console(file=io.StringIO(), width=200), clock=Clock())
    view.feed(record(1))
    assert "network:" not in view.line()
    changes = [{"at_s": 2.5, "change": "a and b cut"}, {"at_s": 3.0, "change": "all cuts healed"}]
    view.feed(record(2, network=changes))
    view.feed(record(3))
    assert "network: all cuts healed (step 2)" in view.line()


@pytest.mark.parametrize("width", [50, 60, 79, 200])
def test_a_narrow_terminal_shows_every_figure_whole(width: int) -> None:
    config = convert(Config, {"run": {"name": "demo"}, "coordinator": {"nodes": 2}, "net": {"dilation": 4.0}})
    records = [record(step) for step in range(30, 33)] + [record(33, heldout_loss=5.25, mfu=0.41)]
    panel = shown(*records, config=config, width=width)
    text = panel[panel.index("╭") :]  # a plain line goes before it
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    labels = ("loss", "held-out, 33", "tokens/s", "emulated tokens/s", "exposed", "averaging", "barrier", "MFU", "sent")
    for part in (*labels, "step 33 of 300", "warm start, uncompressed", "to go", "0.5 Mbit/s", "104 KB", "0.10 s"):
        assert part in text, part
    processes = ("payload/step", "exposed/step", "CPU", "memory", "400 MB", "peak", "450 MB", "node-0", "node-1")
    for part in (*processes, "10 %", "compression"):
        assert part in text, part


def test_a_run_whose_reader_has_gone_goes_on() -> None:
    """As in `isthmus run | head -1`: rich itself would end the process."""
    code = (
        "import sys; from node.watch.console import LastingConsole\n"
        "from node.watch.view import View; from node.config import Config\n"
        "with View(Config(), console=LastingConsole(), clock=lambda: 0.0) as view:\n"
        "    for step in range(1, 50): view.feed({'step': step}); view._print_line()\n"
        "print('more', flush=True); print('alive', file=sys.stderr)"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == "alive\n"
        assert process.wait(timeout=60) == 0


def test_steps_that_were_skipped_are_counted() -> None:
    view = View(Config(), console=Console(file=io.StringIO(), width=200), clock=Clock())
    view.feed(record(1))
    assert "skipped" not in view.line()
    for step in (2, 3, 4):
        view.feed(record(step, skipped=1.0) if step != 3 else record(step))
    assert "steps skipped 2" in view.line()
