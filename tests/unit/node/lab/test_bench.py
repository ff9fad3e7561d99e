"""`isthmus bench`: arithmetic, the page, and what it does where the wire cannot be had."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import ROOT

from netem.errors import IsthmusError
from node.cli import main
from node.commands import bench as command
from node.lab.bench import measure
from node.lab.bench.arms import BASELINE, NODES, PEERS, PeerArm
from node.lab.bench.collectives import CausalChunks, contiguous, zigzag
from node.lab.bench.local import Local
from node.lab.bench.measure import ArmFigures, Found, Point, Scaled, common_settings, plan
from node.lab.bench.nodes import node_config
from node.lab.bench.page import Facts, as_object, document, targets
from node.lab.bench.picture import draw
from node.lab.bench.wire import Carried

FIGURE = ROOT / "configs" / "figure.toml"
FACTS = Facts("isthmus bench", "a machine", "a model", "2026-01-01")


def found(ours_s: float = 1.3, compressed_s: float = 0.5) -> Found:
    arms = [
        ArmFigures(BASELINE.name, [1.9, 2.0, 2.1], None, {"loss": 0.0, "gradient": 3e-7}),
        ArmFigures(NODES[0].name, [ours_s] * 3, 0.9),
        ArmFigures(NODES[6].name, [compressed_s] * 3, 0.1, None, True),
    ]
    wire = [
        Carried("isthmus", "one to one", 8_000_000, 0.22, 0.94, 0.97),
        Carried("ZeroMQ", "one to one", 8_000_000, 0.22, 0.93, 0.90),
        Carried("isthmus", "one to one", 1_000_000, 0.04, 0.7, 0.7),
    ]
    scaled = [Scaled(Point(2, 1.0, None), 1024, {BASELINE.name: 1.0, NODES[0].name: 0.5})]
    return Found(arms, {"torch ring": "gone"}, [Local(4, 0.1, 0.102, 100, 103)], wire, scaled, (0.5, 4.0), 2)


def test_targets_compare_equal_numbers_on_the_wire_and_say_what_was_missed() -> None:
    reached = {target.what: target.reached for target in targets(found())}
    assert reached == {
        "isthmus uncompressed, float32 over all-gather, float32": True,
        "isthmus all layers compressed, bf16 over all-gather, float32": True,
        "local step over plain Llama, 4 chunks: time": True,
        "local step over plain Llama, 4 chunks: memory": False,
        "utilisation of the NIC, one to one, 8 MB": True,
    }
    slower = {target.what: target.reached for target in targets(found(1.31, 0.61))}
    assert not slower["isthmus uncompressed, float32 over all-gather, float32"]
    assert not slower["isthmus all layers compressed, bf16 over all-gather, float32"]


def test_the_page_has_every_figure_and_what_was_left_out(tmp_path: Path) -> None:
    wanted = plan(FIGURE, (), 4, 300e6, quick=True)
    page = document(FACTS, wanted, found())
    assert "Left out: torch ring, since it does not work here: gone." in page
    assert "0.5 and 4.0" in page
    assert "300 Mbit/s" in page
    assert "had other work" not in page
    assert "had other work" in document(FACTS, wanted, found()._replace(load=(1.5, 4.0)))
    assert json.loads(json.dumps(as_object(FACTS, wanted, found())))["arms"][1]["step_s"] == 1.3
    assert draw(wanted, found(), tmp_path / "a.png").stat().st_size > 10_000


def test_names_of_arms_differ() -> None:
    names = [arm.name for arm in (*PEERS, *NODES)]
    assert len(set(names)) == len(names)


def test_arms_of_isthmus_are_configs_with_one_averaging_at_the_end() -> None:
    wanted = plan(FIGURE, (), 4, 300e6, quick=False)
    for arm in wanted.node_arms:
        config = node_config(FIGURE, arm, common_settings(wanted, 4), 5)
        assert config.train.sync_every == config.train.steps
        assert config.train.micro_batches == arm.micro_batches
        assert (config.compress.mode == "dense") == (not arm.compresses)
        assert config.model.chunks == config.coordinator.nodes == 4
    assert node_config(FIGURE, NODES[4], common_settings(wanted, 4), 5).compress.scope == "head"  # the preset's


def test_heads_and_tokens_must_be_shared_out(tmp_path: Path) -> None:
    wanted = plan(FIGURE, (), 3, 300e6, quick=True)
    with pytest.raises(IsthmusError, match="cannot be shared out among 3 nodes"):
        measure._peer_config(
            wanted, ["--model.context=1020", "--model.chunks=3", "--coordinator.nodes=3"], tmp_path, "a"
        )


def test_layouts_own_every_chunk_once() -> None:
    assert contiguous(3).order == [0, 1, 2]
    assert zigzag(3).own_R == ((0, 5), (1, 4), (2, 3))
    assert sorted(zigzag(3).order) == list(range(6))


@pytest.mark.parametrize("own", [(0, 3), (1, 2), (2,)])
def test_attention_of_own_chunks_is_that_of_the_whole_context(own: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    chunks, tokens = 4, 16
    q, k, v = (torch.randn(chunks, 2, 3, tokens, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    out = CausalChunks.apply(q[list(own)], k, v, own)
    whole = torch.nn.functional.scaled_dot_product_attention(
        *(x.movedim(0, 2).flatten(2, 3) for x in (q, k, v)), is_causal=True
    )
    right = whole.unflatten(2, (chunks, tokens)).movedim(2, 0)[list(own)]
    torch.testing.assert_close(out, right)
    weights = torch.randn_like(out)
    mine = torch.autograd.grad((out * weights).sum(), (q, k, v))
    wanted = torch.autograd.grad((right * weights).sum(), (q, k, v))
    for got, expected in zip(mine, wanted, strict=True):
        torch.testing.assert_close(got, expected)


def test_without_the_wire_it_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(command, "unavailable", lambda: "kernel tbf needs root, for network namespaces")
    monkeypatch.setattr(command, "check_corpus", lambda _: None)
    monkeypatch.chdir(tmp_path)
    assert main(["bench", str(FIGURE)]) == 0
    assert capsys.readouterr().out == "skipped:     kernel tbf needs root, for network namespaces\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rate", "fast"], "--rate = 'fast'"),
        (["--rate", "unlimited"], "--rate 'unlimited': expected a limit"),
        (["--nodes", "1"], "--nodes 1: expected 2 or more"),
    ],
)
def test_mistakes_are_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(FIGURE), *words]) == 2
    assert said in capsys.readouterr().err


def test_a_peer_is_named_by_its_method_and_its_wire() -> None:
    assert PeerArm("zigzag", "bfloat16").name == "all-gather zigzag, bf16"
