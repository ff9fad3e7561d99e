"""What an evaluation says of the subspaces, layer by layer, against the same figures written out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.coordinated import corpus, train
from helpers.small import contexts, small_model
from helpers.worlds import WORLDS, exchange_of, full_spec, tiny_config
from torch import Tensor

from coordinator.events import Record
from coordinator.records.recorder import Recorder, aggregate
from node.exchange.passes import PassSpec
from node.subspace.energy import EnergyReport, stable_rank
from node.train.evaluate import heldout_loss
from node.train.passes import loss_sum


def report(batches: int = 1, spec: PassSpec | None = None, clip: float = 0.5, **compress: object) -> dict[str, float]:
    config = tiny_config(compress={"clip": clip} | compress)
    found = EnergyReport()
    model, exchange = small_model(config), exchange_of(config, WORLDS["1"], 0, None)
    with torch.no_grad():
        for seed in range(batches):
            loss_sum(model, exchange, contexts(config, seed), spec or full_spec(config), probe=found)
    return found.metrics()


def activations(kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Z of layer 1, what the subspace gives back, and θ, over two batches."""
    config = tiny_config()
    model, exchange = small_model(config), exchange_of(config, WORLDS["1"], 0, None)
    seen: list[Tensor] = []
    model.get_submodule(f"layers.1.self_attn.{kind}_proj").register_forward_hook(lambda _m, _x, z: seen.append(z))
    codec = dict(model.codecs())[1, kind]
    with torch.no_grad():
        for seed in range(2):
            loss_sum(model, exchange, contexts(config, seed), full_spec(config))
        payloads = [codec.encode(z, (0, 1, 2, 3)) for z in seen]
        back = [
            torch.stack([codec.decode(tuple(t[place] for t in payload), torch.float32) for place in range(4)])
            for payload in payloads
        ]
    return torch.cat(seen), torch.cat(back), torch.cat([theta for _, theta in payloads])


@pytest.mark.parametrize("kind", ["k", "v"])
def test_the_figures_are_those_of_the_tokens_seen(kind: str) -> None:
    z, back, theta = activations(kind)
    found = {key.removeprefix(f"layer1_{kind}_"): value for key, value in report(2).items() if f"layer1_{kind}" in key}
    values = torch.linalg.svdvals(z.double().reshape(-1, 16))
    assert found == pytest.approx(
        {
            "energy_kept": 1 - float((z - back).square().sum() / z.square().sum()),
            "theta_mean": float(theta.mean()),
            "theta_std": float(theta.std(correction=0)),
            "theta_clip_share": float((theta.abs() >= 0.5).float().mean()),
            "stable_rank": float(values.square().sum() / values[0].square()),
        },
        rel=1e-4,
        abs=1e-7,
    )
    assert 0.05 < found["energy_kept"] < 0.95
    assert found["theta_std"] > 1e-3


def test_every_layer_is_told_and_no_more_than_it_has() -> None:
    found = report()
    compressed = {"energy_kept", "theta_mean", "theta_std", "theta_clip_share", "stable_rank"}
    for layer, figures in ((0, compressed), (1, compressed), (2, {"stable_rank"})):
        for kind in "kv":
            prefix = f"layer{layer}_{kind}_"
            assert {key.removeprefix(prefix) for key in found if key.startswith(prefix)} == figures
    assert not any("theta" in key for key in report(rotation="fixed"))
    assert {key[9:] for key in report(spec=PassSpec(4, False))} == {"stable_rank"}  # the warm start


def test_theta_at_its_clip_is_told() -> None:
    assert report(clip=1e-4)["layer0_k_theta_clip_share"] > 0.9
    assert report(clip=1e3)["layer0_k_theta_clip_share"] == 0.0


def test_a_full_rank_keeps_everything() -> None:
    found = report(rotation="fixed", k_share=0.0, v_share=0.0)
    kept = [value for key, value in found.items() if key.endswith("energy_kept")]
    assert kept == pytest.approx([1.0] * 4, abs=1e-5)


@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0])
def test_the_stable_rank_is_that_of_the_singular_values(spread: float) -> None:
    """Also where the two largest are near each other: then it matters little which is found."""
    source = torch.Generator().manual_seed(4)
    scales = torch.tensor([1 + spread, 1.0, *[0.3] * 10], dtype=torch.float64)
    rows = torch.linalg.qr(torch.randn(12, 12, generator=source, dtype=torch.float64)).Q * scales
    assert stable_rank(rows.mT @ rows) == pytest.approx(float(scales.square().sum() / scales.max() ** 2), rel=2e-3)
    assert stable_rank(torch.zeros(3, 3)) == 0.0
    assert stable_rank(torch.full((3, 3), float("nan"))) == 0.0


def test_looking_changes_nothing() -> None:
    config = tiny_config()
    model, exchange, spec = small_model(config), exchange_of(config, WORLDS["1"], 0, None), full_spec(config)
    plain = heldout_loss(model, exchange, corpus(), spec, 2, 3)
    assert heldout_loss(model, exchange, corpus(), spec, 2, 3, EnergyReport()) == plain


def test_evaluations_report_it_and_the_recorder_takes_the_mean(tmp_path: Path) -> None:
    config = tiny_config(train={"steps": 6, "sync_every": 3, "eval_every": 3})
    run, _ = train(config, WORLDS["3+1"], tmp_path)
    said = [[by_step[step][0] or {} for by_step in run.said] for step in range(7)]
    assert [step for step in range(7) if "layer2_v_stable_rank" in said[step][0]] == [1, 3, 6]
    assert [step for step in range(7) if "layer0_k_energy_kept" in said[step][0]] == [3, 6]
    nodes = {f"node-{rank}": metrics for rank, metrics in enumerate(said[6])}
    parts = [metrics["layer0_k_energy_kept"] for metrics in nodes.values()]
    assert parts[0] != parts[1]
    for ending in ("energy_kept", "theta_mean", "theta_std", "theta_clip_share", "stable_rank"):
        key = f"layer0_k_{ending}"
        assert aggregate(nodes)[key] == pytest.approx(sum(metrics[key] for metrics in nodes.values()) / 2)
    with Recorder(tmp_path) as recorder:
        recorder.record(Record(step=6, generation=1, nodes=nodes))
    assert '"layer0_k_energy_kept": ' in (tmp_path / "metrics.jsonl").read_text()


def test_a_leaking_run_is_marked_in_every_record_of_a_compressed_step(tmp_path: Path) -> None:
    """The warm start sends K and V whole, as do steps after unplugging: nothing is projected there."""
    leaking, _ = train(tiny_config(compress={"own": "projected", "unplug_step": 5}), WORLDS["1"], tmp_path)
    causal, _ = train(tiny_config(compress={"own": "projected", "theta": "previous"}), WORLDS["1"], tmp_path)
    assert [(metrics or {}).get("leaks") for metrics, _ in leaking.said[0].values()] == [
        *[None] * 3,
        *[1.0] * 3,
        None,
    ]
    assert not any("leaks" in (metrics or {}) for metrics, _ in causal.said[0].values())
