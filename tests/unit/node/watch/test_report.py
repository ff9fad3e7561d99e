"""What the pictures of runs are drawn from, that they are drawn, and what is said where they cannot be."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

from netem.config import dump_toml
from netem.errors import ConfigError
from node.watch.recorded import caption, read_run
from node.watch.report import MOST_NODES, draw_comparison, draw_report, smooth


def line(step: int, *, time: float | None = None, names: Sequence[str] = ("node-0", "node-1"), **top: Any) -> str:
    """A record: steps of 2 s; the first is at a quarter of the context, uncompressed."""
    warm = step == 1
    nodes = {
        name: {
            "tokens": 64.0 if warm else 256.0,
            "step_s": 2.0,
            "compute_s": 1.2,
            "exposed_s": 0.5,
            "exposed_forward_s": 0.4,
            "exposed_backward_s": 0.1,
            "barrier_s": 0.3,
            "layer/7/exposed_forward_s": 0.3,
            "memory_peak_bytes": 4e8,
            "compressed_bytes": 0.0 if warm else 1e4,
            "dense_bytes": 1e5,
            "uncompressed_bytes": 1e5 if warm else 3e5,
            "replaced_bytes": 0.0 if warm else 2e5,
            "averaging_bytes": 1e6 if step % 2 == 0 else 0.0,
            "sent_wire_bytes": 2e6,
        }
        for name in names
    }
    keys = next(iter(nodes.values()), {})
    totals = {key: sum(values[key] for values in nodes.values()) for key in keys} | {"step_s": 2.0, "mfu": 0.4}
    when = 5000.0 + 2 * step if time is None else time
    record = {"step": step, "time": when, "loss": 10.0 / step, **totals, "nodes": nodes, **top}
    return json.dumps(record) + "\n"


def folder(place: Path, lines: Sequence[str], config: Mapping[str, Any] | None = None) -> Path:
    place.mkdir(parents=True)
    (place / "metrics.jsonl").write_text("".join(lines))
    if config is not None:
        (place / "config.toml").write_text(dump_toml(config))
    return place


HOME_LINE = {"compress": {"mode": "subspace"}, "net": {"profile": "internet-300mbps"}}


def is_picture(path: Path) -> bool:
    pixels = matplotlib.image.imread(path)
    return pixels.shape[1] == 2000 and float(pixels.std()) > 0.02


def test_a_run_is_drawn_into_its_folder(tmp_path: Path) -> None:
    lines = [line(step, **({"heldout_loss": 6.0} if step in (1, 6) else {})) for step in range(1, 7)]
    run = folder(tmp_path / "demo", lines, HOME_LINE)
    assert draw_report(run) == run / "report.png"
    assert is_picture(run / "report.png")
    assert sorted(path.name for path in run.iterdir()) == ["config.toml", "metrics.jsonl", "report.png"]


def test_one_step_without_nodes_or_config_is_enough(tmp_path: Path) -> None:
    assert is_picture(draw_report(folder(tmp_path / "a", ['{"step": 1, "time": 3.5, "loss": 2.0}\n'])))
    assert is_picture(draw_report(folder(tmp_path / "b", [line(1)])))


def test_many_nodes_are_the_busiest_ones(tmp_path: Path) -> None:
    names = [f"node-{i}" for i in range(MOST_NODES + 3)]
    assert is_picture(draw_report(folder(tmp_path / "wide", [line(1, names=names), line(2, names=names)])))


def test_several_runs_are_drawn_over_each_other(tmp_path: Path) -> None:
    runs = [folder(tmp_path / name, [line(1), line(2), line(3)], HOME_LINE) for name in ("compressed", "dense")]
    path = tmp_path / "docs" / "figure.png"
    assert draw_comparison(runs, path) == path
    assert is_picture(path)


def test_the_caption_has_the_totals(tmp_path: Path) -> None:
    text = caption(read_run(folder(tmp_path / "demo", [line(1), line(2), line(3)], HOME_LINE)))
    assert text.splitlines() == [
        "3 steps, 1,152 tokens in 0:06 · 256 tokens/s at full context · 6 MB sent per node (2 nodes)",
        "payload bytes saved by compression: 95.0% in compressed layers, 63.3% over all layers, 54.3% over all steps",
        "time of a step: compute 60.0%, exposed communication forward 20.0%, backward 5.0%, barrier 15.0%",
        "longest waits: layer 7, forward (60% of the exposed) · MFU 40.0% · memory at most 800 MB a node",
        "mode subspace, network emulated internet-300mbps (300 Mbit/s for each link, latency 25 ms)",
    ]


def test_the_caption_says_which_steps_send_keys_and_values_whole(tmp_path: Path) -> None:
    phases = {"mode": "subspace", "warmup_steps": 1, "unplug_step": 2}
    text = caption(read_run(folder(tmp_path / "a", [line(1), line(2)], HOME_LINE | {"compress": phases})))
    assert "mode subspace, warm start up to step 1, unplugged after step 2, network emulated" in text
    dense = HOME_LINE | {"compress": phases | {"mode": "dense"}}
    assert "mode dense, network" in caption(read_run(folder(tmp_path / "b", [line(1)], dense)))


def test_under_time_dilation_the_caption_has_both_clocks(tmp_path: Path) -> None:
    slow = folder(tmp_path / "slow", [line(1), line(2), line(3)], {"net": HOME_LINE["net"] | {"dilation": 4.0}})
    text = caption(read_run(slow))
    assert "tokens in 0:06 (emulated: 1.5 s) · 256 (emulated: 1,024) tokens/s at full context" in text
    assert "latency 25 ms, time dilated 4 times)" in text


def test_only_a_shaped_network_is_called_emulated(tmp_path: Path) -> None:
    plain = folder(tmp_path / "plain", [line(1)], {"net": {"profile": "unshaped"}})
    assert "emulated" not in caption(read_run(plain))
    gone = folder(tmp_path / "gone", [line(1)], {"net": {"profile": "nowhere/my-line.toml"}})
    assert caption(read_run(gone)).endswith("network emulated nowhere/my-line.toml")


def test_steps_done_again_after_a_resume_count_once_and_the_pause_not_at_all(tmp_path: Path) -> None:
    lines = [line(1), line(2), line(3), line(2, time=9000.0, loss=1.5), line(3, time=9002.0)]
    run = read_run(folder(tmp_path / "resumed", lines))
    assert [(record["step"], record["loss"]) for record in run.records] == [(1, 10.0), (2, 1.5), (3, 10.0 / 3)]
    assert run.elapsed_s == [2.0, 4.0, 6.0]


def test_a_line_that_is_being_written_is_left_for_later(tmp_path: Path) -> None:
    run = read_run(folder(tmp_path / "running", [line(1), line(2)[:40]]))
    assert len(run.records) == 1


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        ([], "nothing to draw"),
        (['{"step": 1, "loss": null}\n'], "nothing to draw"),
        ([line(1), "not JSON\n"], "line 2: not JSON"),
        (["[1]\n"], "line 1: expected a record"),
    ],
)
def test_what_cannot_be_drawn_is_said(tmp_path: Path, lines: list[str], complaint: str) -> None:
    run = folder(tmp_path / "run", lines)
    with pytest.raises(ConfigError, match=complaint):
        draw_report(run)
    assert not (run / "report.png").exists()


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"metrics\.jsonl: no such file; give the folder of a run"):
        draw_report(tmp_path)
    with pytest.raises(ConfigError, match="at least one folder"):
        draw_comparison([], tmp_path / "a.png")


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    run = folder(tmp_path / "run", [line(1)])
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"figure\.png: cannot be written"):
        draw_comparison([run], tmp_path / "file" / "figure.png")


def test_smoothing_neither_shifts_nor_invents() -> None:
    assert smooth([1.0, 2.0, 3.0, 4.0, 5.0], 3) == [1.0, 2.0, 3.0, 4.0, 5.0]  # a straight line stays
    assert smooth([0.0, 0.0, 9.0, 0.0, 0.0], 3) == [0.0, 3.0, 3.0, 3.0, 0.0]
    assert smooth([4.0], 5) == [4.0]
    assert smooth([], 3) == []


def test_a_run_that_leaks_is_marked_wherever_it_is_named(tmp_path: Path) -> None:
    leaking = folder(tmp_path / "one", [line(1), line(2, leaks=1.0)], HOME_LINE)
    assert read_run(leaking).name == "one (leaks)"
    assert read_run(folder(tmp_path / "two", [line(1), line(2)], HOME_LINE)).name == "two"


def test_the_caption_says_how_the_network_changed(tmp_path: Path) -> None:
    changes = [[{"at_s": float(step), "change": f"rate {step} Mbit/s everywhere"}] for step in range(1, 7)]
    lines = [line(step, network=change) for step, change in enumerate(changes, start=1)]
    assert caption(read_run(folder(tmp_path / "a", lines, HOME_LINE))).endswith(
        "\nnetwork changed: step 1: rate 1 Mbit/s everywhere; step 2: rate 2 Mbit/s everywhere; "
        "step 3: rate 3 Mbit/s everywhere; step 4: rate 4 Mbit/s everywhere; 2 more"
    )
    assert "network changed" not in caption(read_run(folder(tmp_path / "b", [line(1)], HOME_LINE)))


def test_the_caption_says_who_was_lost(tmp_path: Path) -> None:
    fault = {"kind": "lost", "nodes": ["node-1"], "reason": "node-1 was lost: silent for 15 s", "step": 1}
    lines = [line(1), line(2, faults=[fault, "nonsense"])]
    assert caption(read_run(folder(tmp_path / "a", lines, HOME_LINE))).endswith(
        "\nnodes: step 1: node-1 was lost: silent for 15 s"
    )
