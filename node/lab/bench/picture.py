"""The picture of a benchmark: the step of every arm, and what each carrier uses of a NIC."""

from __future__ import annotations

from pathlib import Path
from statistics import quantiles

from node.lab.bench.arms import BASELINE
from node.lab.bench.measure import Found, Plan, rate_text
from node.lab.bench.page import COMPRESSED_SHARE, UNCOMPRESSED_SHARE
from node.watch.style import BLUE, GREEN, ORANGE, save_png, styled_figure

GREY = "#888888"


def draw(plan: Plan, found: Found, path: Path) -> Path:
    """Draw into the PNG `path`. Raises `ConfigError` where it cannot be written."""
    arms = found.arms[::-1]
    with styled_figure(10, 1.6 + 0.3 * len(arms)) as figure:
        steps, wire = figure.subplots(1, 2, width_ratios=(2, 1))
        ms = [1e3 * arm.step_s for arm in arms]
        spread = [quantiles(arm.steps_s, n=4) for arm in arms]
        error = [
            [max(0.0, value - 1e3 * low) for value, (low, _, _) in zip(ms, spread, strict=True)],
            [max(0.0, 1e3 * high - value) for value, (_, _, high) in zip(ms, spread, strict=True)],
        ]
        colours = [GREY if arm.off is not None else BLUE if arm.compresses else GREEN for arm in arms]
        steps.barh([arm.name for arm in arms], ms, xerr=error, color=colours, error_kw={"linewidth": 0.8})
        base_ms = next(1e3 * arm.step_s for arm in arms if arm.name == BASELINE.name)
        for share in (UNCOMPRESSED_SHARE, COMPRESSED_SHARE):
            steps.axvline(share * base_ms, color=ORANGE, linewidth=1, linestyle="--")
            steps.annotate(
                f" {share:.2f} ×", (share * base_ms, 1), xycoords=("data", "axes fraction"), fontsize=8, va="bottom"
            )
        steps.set(xlabel="ms a step (median; bars: middle half)")
        steps.set_title(f"{plan.nodes} nodes, NICs of {rate_text(plan.rate_bps)}", pad=14)
        rows = found.wire[::-1]
        wire.barh(
            [f"{row.carrier}, {row.pattern}, {row.nbytes / 1e6:g} MB" for row in rows],
            [100 * row.utilisation for row in rows],
            color=[BLUE if row.carrier == "isthmus" else GREY for row in rows],
        )
        wire.axvline(95, color=ORANGE, linewidth=1, linestyle="--")
        wire.set(title="Messages alone", xlabel="use of a NIC, %")
        return save_png(figure, path)
