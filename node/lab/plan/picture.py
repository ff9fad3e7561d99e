"""The picture of a plan: tokens/s and utilisation over bandwidth, with a line for each number of nodes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from node.lab.plan.compare import Curve
from node.watch.style import RUN_LOOKS, save_png, styled_figure


def draw_curves(curves: Sequence[Curve], rates_bps: Sequence[float], title: str, note: str, path: Path) -> Path:
    """Draw into the PNG `path`. Raises `ConfigError` where it cannot be written."""
    rates_mbps = [rate_bps / 1e6 for rate_bps in rates_bps]
    with styled_figure(10, 4.4) as figure:
        speed, share = figure.subplots(1, 2)
        for curve, (colour, dashes) in zip(curves, RUN_LOOKS, strict=False):
            look = {"color": colour, "linestyle": dashes, "linewidth": 1.8}
            speed.plot(rates_mbps, curve.tokens_per_s, label=f"{curve.nodes} nodes", **look)
            share.plot(rates_mbps, [100 * value for value in curve.utilisation], **look)
        speed.set(title="Tokens/s", ylabel="tokens/s", xscale="log", yscale="log")
        share.set(title="Utilisation", ylabel="% of a network without limits", xscale="log", ylim=(0, 102))
        for axes in (speed, share):
            axes.set_xlabel("bandwidth (Mbit/s)")
        speed.legend(loc="lower right")
        figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
        figure.supxlabel(note, x=0.01, ha="left", fontsize=9, color="#444444")
        return save_png(figure, path)
