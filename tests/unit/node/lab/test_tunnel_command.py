"""`isthmus tunnel`: what it writes, its exit codes, its mistakes; and the bench's node, with a wire to nobody."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.tunnel_runs import PAPER, ROOT, bench_of_work, target, write_run

from netem.profile import resolve
from node.cli import main
from node.commands import tunnel as command
from node.config import Config, load_config
from node.lab.plan.lines import lines_of
from node.lab.tunnel.bench import Bench, bench_of
from node.lab.tunnel.bench import Repeat as BenchRepeat
from node.lab.tunnel.bench_node import Rank, StepTimes, mode_of
from node.lab.tunnel.design import Design
from node.lab.tunnel.page import attention_share
from node.lab.tunnel.small import small_config
from node.train.from_config import payload_format

TINY = str(ROOT / "configs" / "tiny.toml")


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    handler = signal.getsignal(signal.SIGTERM)  # the command sets its own
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def _no_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host whose ranks compute as the planner says."""

    def measure(config: Config, *_rest: object) -> dict[str, Bench]:
        return {mode: bench_of_work(mode_of(config, mode), crowding=2.0) for mode in ("subspace", "dense")}

    monkeypatch.setattr(command, "measure", measure)
    monkeypatch.setattr(command, "check_corpus", lambda _: None)


@pytest.mark.usefixtures("_no_bench")
def test_it_writes_profiles_configs_and_a_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tunnel", "--target", PAPER, "--nodes", "4", "--net", "internet-300mbps", "--out", "out"]) == 0
    assert "isthmus run out/uncompressed.toml" in capsys.readouterr().out
    report = json.loads(Path("out/report.json").read_text())
    for mode in ("centralized", "compressed", "uncompressed"):
        config = load_config(Path(f"out/{mode}.toml"))
        figures = report["modes"][mode]
        assert config.coordinator.nodes == 4
        assert config.train.sync_every == figures["sync_every"]
        rate_bps = lines_of(resolve(config.net), 4).slowest_bps()
        asked_bps = 1e11 if mode == "centralized" else 3e8
        assert rate_bps == pytest.approx(asked_bps * figures["rate_scale"], rel=1e-5)
        assert figures["tunnel"]["latency"] == pytest.approx(figures["target"]["latency"])
    page = Path("out/report.md").read_text()
    assert "| uncompressed | whole layer" in page
    assert "## The runs" not in page


@pytest.mark.usefixtures("_no_bench")
@pytest.mark.parametrize(("slower", "code", "runs"), [(1.0, 0, 1), (1.6, 0, 2)])
def test_runs_are_made_until_they_hold(
    slower: float, code: int, runs: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The cores turn out `slower` than the bench had them; the second run knows."""
    made = follow_runs(monkeypatch, lambda _: slower)
    assert main(["tunnel", "--target", PAPER, "--net", "paper-link", "--out", "out", "--run"]) == code
    assert made == ["centralized"] * runs + ["compressed"] * runs + ["uncompressed"] * runs
    page = (tmp_path / "out" / "report.md").read_text()
    assert page.count("held, every number within 10%") == 3
    assert page.count("run 1, ") == page.count("MISSED") == 3 * (runs - 1)
    assert page.count("| 55,000 |") == 1


@pytest.mark.usefixtures("_no_bench")
def test_one_mode_can_be_run_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = follow_runs(monkeypatch, lambda _: 1.0)
    arguments = ["--target", PAPER, "--net", "paper-link", "--mode", "compressed", "--out", "out", "--run"]
    assert main(["tunnel", *arguments]) == 0
    assert made == ["compressed"]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert list(report["modes"]) == ["compressed"]
    assert "--mode=compressed" in report["command"]


@pytest.mark.usefixtures("_no_bench")
def test_a_host_that_comes_late_is_said_with_the_figure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    follow_runs(monkeypatch, lambda _: 1.0, late=0.08)
    arguments = ["--target", PAPER, "--net", "paper-link", "--mode", "centralized", "--out", "out", "--run"]
    assert main(["tunnel", *arguments]) == 1
    page = (tmp_path / "out" / "report.md").read_text()
    assert "centralized: transfers took 8% longer than they should have" in page


@pytest.mark.usefixtures("_no_bench")
def test_a_run_that_never_holds_ends_with_1(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = follow_runs(monkeypatch, lambda run: 1.5 ** (run + 1))
    arguments = ["tunnel", "--target", PAPER, "--nodes", "4", "--net", "paper-link", "--out", "out", "--run"]
    assert main(arguments) == 1
    assert len(made) == 3 * command.ATTEMPTS
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert not report["modes"]["uncompressed"]["run"]["held"]
    assert len(report["modes"]["uncompressed"]["run"]["missed_before"]) == command.ATTEMPTS - 1
    page = (tmp_path / "out" / "report.md").read_text()
    assert page.count("MISSED, ") == 3 * command.ATTEMPTS
    assert "55,000" not in page  # of eight nodes


def follow_runs(monkeypatch: pytest.MonkeyPatch, slower: Callable[[int], float], late: float = 0.0) -> list[str]:
    """Put made-up runs in place of real ones, each with compute `slower(run)` times the tunnel's first, on links that
    are `late`, a share; their modes."""
    made: list[str] = []
    designs: list[Design] = []
    first: dict[str, Design] = {}
    write = command._write

    def note(out: Path, part: command.Part, small: Config) -> Config:
        designs.append(part.design)
        first.setdefault(part.goal.mode.name, part.design)
        return write(out, part, small)

    def run_swarm(config: Config) -> Config:
        mode = config.run.name
        body = first[mode].body.slowed(slower(len(made)))
        write_run(config.run.folder, config, designs[-1], body, late)
        made.append(mode)
        return config

    monkeypatch.setattr(command, "_write", note)
    monkeypatch.setattr(command, "run_swarm", run_swarm)
    return made


@pytest.mark.parametrize("name", ["paper-800m", "paper-3b", "tiny", "demo", "figure"])
def test_every_config_can_be_a_target(name: str) -> None:
    config = load_config(ROOT / "configs" / f"{name}.toml", ["--coordinator.address=tcp://127.0.0.1:0"])
    small = small_config(config, None, 12, Path("out"))
    assert small.model.layers == config.model.layers
    assert small.assignment() == config.assignment()
    if name == "paper-800m":
        assert attention_share(small.model) == pytest.approx(attention_share(config.model), rel=0.01)


def test_widths_and_data_may_be_anothers() -> None:
    tiny = load_config(Path(TINY))
    small = small_config(target(nodes=8), tiny, 12, Path("out"))
    assert (small.model.d_model, small.model.chunk_tokens, small.data) == (64, 64, tiny.data)
    assert (small.model.layers, small.model.chunks, small.coordinator.nodes) == (8, 8, 8)
    assert small.compress.k_share == 0.98
    assert payload_format(small).layers == 8


@pytest.mark.parametrize("mode", ["subspace", "dense"])
def test_a_rank_steps_without_a_network_and_times_every_layer(mode: str) -> None:
    changes = ["--coordinator.nodes=4", "--model.context=64", "--model.d_model=16", "--model.ffn_dim=16"]
    changes += ["--compress.format=int8", f"--compress.mode={mode}"]
    rank = Rank(load_config(Path(TINY), changes), 3)
    for times in (rank.step(), rank.step()):
        assert len(times.layers_s) == 3
        assert all(forward_s > 0 and backward_s > 0 for forward_s, backward_s in times.layers_s)
        assert sum(map(sum, times.layers_s)) < times.step_s


def test_the_fullest_node_speaks_for_the_bench_in_medians() -> None:
    config = mode_of(small_config(target(), None, 12, Path("out")), "dense")

    def steps(first_s: float, last_s: float) -> list[StepTimes]:
        return [StepTimes(step_s, [(step_s / 32, step_s / 16)] * 8) for step_s in (first_s, 1.0, 1.0, last_s)]

    bench = bench_of(config, [BenchRepeat(steps(1.0, last_s), steps(9.0, 6.0)) for last_s in (2.0, 2.1, 50.0)])
    assert bench.rank == 3
    assert bench.body.step_s == 2.1
    assert bench.body.layer_s == pytest.approx(2.1 * 3 / 64)
    assert bench.evenness == pytest.approx(5.1 / 4 / 2.1)
    assert bench.crowding == pytest.approx(6.0 / 2.1)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--target", "paper-9t"], "paper-9t: no such config; configs/ has none here; give one of them, or the path"),
        (["--target", "none.toml"], "none.toml: no such file"),
        (["--target", TINY, "--nodes", "1"], "--nodes 1: expected 2 or more"),
        (["--target", TINY, "--nodes", "5"], "coordinator.nodes = 5: more nodes than chunks (4)"),
        (["--target", TINY, "--net", "pigeon"], "net.profile = 'pigeon': no such profile"),
        (["--target", TINY, "--net", "unshaped"], "--net unshaped: has no rate"),
        (["--target", TINY, "--net.dilation", "3"], "net.dilation = 3.0: the tunnel sets it"),
        (["--target", TINY, "--device", "abacus"], "--device abacus: no such device"),
        (["--target", TINY, "--mfu", "7"], "--mfu 7: expected a share of the peak"),
        (["--target", TINY, "--steps", "7"], "--steps 7: expected 8 or more"),
        (["--target", TINY, "--small", "none.toml"], "none.toml: no such file"),
        (["--target", TINY, "--mode", "dense"], "--mode dense: no such mode; there are centralized, compressed"),
        (["--target", TINY, "--compress.budget_bytes_per_token", "40"], "compress.budget_bytes_per_token: the tunnel"),
        (["--target", TINY, "--data.document_masking", "true"], "data.document_masking = true: expected false"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tunnel", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert expected in captured.err
    assert len(captured.err.splitlines()) == 1
    assert not list(Path().iterdir())
