"""What a study writes in words: NAME.md, a table that a reader can judge, and NAME.jsonl, all that it rests on."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from coordinator.records.folder import whole_file
from netem.config import Tree
from netem.errors import ConfigError
from node.config import Config
from node.config.data import RECALL
from node.lab.study.figures import CLEAR, Figures, Line, Result, Spread
from node.lab.study.table import DENSE, LOCAL, Study


def document(study: Study, found: Figures, results: Mapping[str, Sequence[Result]], command: str, stem: str) -> str:
    """The Markdown of a study. `command` is the line that makes it again."""
    parts = [
        f"# {study.title}",
        study.text,
        f"    {command}",
        _setting(study, results),
        f"![{study.title}]({stem}.png)",
        _gain(found),
        _table(study, found),
        _legend(),
        f"Arms are the base `{study.base}` with these settings laid over it:",
        "\n".join(f"- **{arm.name}**: {_settings(arm.settings) or 'the base as it is'}" for arm in study.arms),
        f"Every run's figures are in [{stem}.jsonl]({stem}.jsonl).",
    ]
    return "\n\n".join(parts) + "\n"


def write(path: Path, text: str) -> Path:
    """Write a file whole. Raises `ConfigError` where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as unfinished:
            unfinished.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}); name another folder with --out") from None
    return path


def raw(results: Mapping[str, Sequence[Result]]) -> str:
    """One JSON object a run, with its arm."""
    lines = [json.dumps({"arm": arm, **result}) for arm, of_arm in results.items() for result in of_arm]
    return "\n".join(lines) + "\n"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    rule = ["---"] + ["--:"] * (len(header) - 1)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


def spread_text(spread: Spread, form: str = ".4f") -> str:
    """Mean ± standard deviation."""
    return f"{spread.mean:{form}}" + ("" if math.isnan(spread.std) else f" ± {spread.std:{form}}")


def _setting(study: Study, results: Mapping[str, Sequence[Result]]) -> str:
    config = study.arms[0].config
    runs = [result for of_arm in results.values() for result in of_arm]
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
        return f"{gain}, of one seed: whether it stands clear of the noise is not known, so no gain retained is given."
    if not found.clear:
        return (
            f"{gain} over {found.seeds} seeds: **not above {CLEAR:g} standard deviations**, so no gain retained is "
            "given. In this training the far context is worth nothing that can be told from noise, and a loss that "
            "equals the dense one proves nothing."
        )
    return f"{gain}, mean ± standard deviation over {found.seeds} seeds."


def _table(study: Study, found: Figures) -> str:
    header = [
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
    return table(header, [_row(line, found) for line in found.lines])


def _row(line: Line, found: Figures) -> list[str]:
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


def _legend() -> str:
    return (
        "Loss in nats a token that is asked for, mean ± standard deviation over seeds. Gain retained is "
        f"(loss({LOCAL}) − loss(arm)) / G, seed by seed. Bytes are payload bytes one way to one reader, by the formula "
        "that the wire is tested against; savings are against K and V as they are, in bfloat16, or in float32 where "
        "the arm sends nothing narrower; the last column is of a token of the whole training, uncompressed steps "
        "included. An arm that leaks sees later tokens of its own chunk: its loss is no evidence."
    )


def _settings(settings: Tree, prefix: str = "") -> str:
    found = []
    for key, value in settings.items():
        if isinstance(value, dict):
            found.append(_settings(value, f"{prefix}{key}."))
        else:
            found.append(f"`{prefix}{key} = {json.dumps(value)}`")
    return ", ".join(found)
