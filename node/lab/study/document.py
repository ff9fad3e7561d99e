"""The page of a study, NAME.md: a table that a reader can judge, and how it was made."""

from __future__ import annotations

import json
import math

from netem.config import Tree
from netem.tables import markdown_table
from node.config import Config
from node.config.data import RECALL
from node.lab.study.far_page import FAR_LEGEND, far_gain, far_table
from node.lab.study.figures import CLEAR, Figures, Line, Spread
from node.lab.study.record import Recipe, Results
from node.lab.study.spectrum import layer_table, training_table
from node.lab.study.table import DENSE, LOCAL, Study

SPECTRUM = "spectrum"
"""The study whose page also has tables of stable ranks."""


def document(recipe: Recipe, study: Study, found: Figures, results: Results) -> str:
    """The Markdown of a study."""
    stem = recipe.stem
    old = [_gain(found), _table(found), _LEGEND]
    parts = [
        f"# {study.title}",
        *([f"**{study.note}**"] if study.note else []),
        study.text,
        f"    {recipe.command}",
        _setting(study, results),
        f"![{study.title}]({stem}.png)",
        *([far_gain(found.far), far_table(found, found.far), FAR_LEGEND] if found.far else old),
        f"Arms are the base `{study.base}` with these settings laid over it:",
        "\n".join(f"- **{arm.name}**: {_settings(arm.settings) or 'the base as it is'}" for arm in study.arms),
        f"Every run's figures are in [{stem}.jsonl]({stem}.jsonl); `isthmus study {stem} --redraw` makes this page "
        "and its picture from them.",
    ]
    if study.name == SPECTRUM:
        parts += ["## Over training, mean over layers", training_table(results)]
        parts += ["## After training", layer_table(results)]
    return "\n\n".join(parts) + "\n"


def spread_text(spread: Spread, form: str = ".4f") -> str:
    """Mean ± standard deviation."""
    return f"{spread.mean:{form}}" + ("" if math.isnan(spread.std) else f" ± {spread.std:{form}}")


def _setting(study: Study, results: Results) -> str:
    config = study.arms[0].config
    runs = [result for arm_results in results.values() for result in arm_results]
    cpu_s = sum(float(result["cpu_s"]) for result in runs)
    hosts = sorted({str(result["host"]) for result in runs})
    model, train = config.model, config.train
    return (
        f"Hardware: {'; '.join(hosts)}; one thread a run; {len(runs)} runs, {cpu_s / 3600:.2f} CPU-hours. "
        f"Code {', '.join(sorted({str(result['code']) for result in runs}))}.\n\n"
        f"Model: {model.layers} layers, d = {model.d_model}, {model.heads} heads, d_kv = {model.d_kv}; "
        f"T = {model.context} tokens in C = {model.chunks} chunks of n = {model.chunk_tokens}. "
        f"Training: {train.steps} steps of {train.batch} contexts, lr {train.lr:g}. Data: {_data(config)}; "
        f"held-out loss at the last step over {runs[0]['heldout_tokens']} tokens, the same for all arms and seeds."
    )


def _data(config: Config) -> str:
    if config.data.corpus == RECALL:
        return "the recall probe (loss on repeats and answers only)"
    return f"{config.data.corpus}, tokenizer {config.data.tokenizer}"


def _gain(found: Figures) -> str:
    """The context gain, or why there is nothing to retain."""
    gain = f"Context gain G = loss({LOCAL}) − loss({DENSE}) = {spread_text(found.gain)} nats a token"
    if found.seeds < 2:
        return f"{gain}, from one seed. The noise between seeds is not known, so no gain retained is given."
    if not found.clear:
        return (
            f"{gain} over {found.seeds} seeds: **not above {CLEAR:g} standard deviations**, so no gain retained is "
            "given. In this training the far context is worth nothing that can be told from noise, and a loss that "
            "equals the dense one proves nothing."
        )
    return f"{gain}, mean ± standard deviation over {found.seeds} seeds."


def _table(found: Figures) -> str:
    head = [
        "arm",
        "held-out loss",
        f"loss − {DENSE}",
        "gain retained",
        "B/token in a compressed layer",
        "B/token in the mean layer",
        "saved in compressed layers",
        "saved in all layers",
        "saved in all layers and steps",
    ]
    return markdown_table(head, [_row(line) for line in found.lines], align="lr")


def _row(line: Line) -> list[str]:
    traffic = line.traffic
    retained = "–" if line.retained is None or line.leaks else f"{spread_text(_percent(line.retained), '.1f')} %"
    compressed = traffic.compressed_bytes is not None and traffic.compressed_saving is not None
    return [
        f"{line.arm} (leaks)" if line.leaks else line.arm,
        spread_text(line.loss),
        "0" if line.arm == DENSE else spread_text(line.gap, "+.4f").replace("± +", "± "),
        retained,
        f"{traffic.compressed_bytes:.1f}" if compressed else "–",
        f"{traffic.mean_layer_bytes:.1f}",
        f"{traffic.compressed_saving:.1%}" if compressed else "–",
        f"{traffic.all_saving:.1%}",
        f"{traffic.run_saving:.1%}",
    ]


def _percent(spread: Spread) -> Spread:
    return Spread(100 * spread.mean, 100 * spread.std)


_LEGEND = (
    "Loss is in nats for each token that is asked for, mean ± standard deviation over seeds. Gain retained is "
    f"(loss({LOCAL}) − loss(arm)) / G, seed by seed. Bytes are payload bytes one way to one reader, by the formula "
    "that the wire is tested against. Savings are relative to uncompressed K and V in bfloat16, or in float32 where "
    "the arm sends nothing narrower. The last column counts every token of the training, those of uncompressed steps "
    "included. In an arm that leaks, tokens see later tokens of their own chunk, so its loss is no evidence."
)


def _settings(settings: Tree, prefix: str = "") -> str:
    found = []
    for key, value in settings.items():
        if isinstance(value, dict):
            found.append(_settings(value, f"{prefix}{key}."))
        else:
            found.append(f"`{prefix}{key} = {json.dumps(value)}`")
    return ", ".join(found)
