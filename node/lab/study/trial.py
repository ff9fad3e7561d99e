"""One run of a study: one process, all nodes in it, one torch thread. `python -m node.lab.study.trial JOB RESULT`.

Training is `node.train.trainer.Trainer` as `isthmus node` runs it; the coordinator and the wires are those of
`node.lab.in_process`. The held-out loss is that of rank 0's model, at the full context in every phase (the trainer's
own evaluation uses the shorter context during the warm start). The result file appears whole or not at all.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

from coordinator.assignment import assign
from coordinator.records.folder import whole_file
from netem.children import end_with_parent
from netem.config import convert
from netem.errors import ConfigError, RunAborted
from node.config import Config, to_tree
from node.data import Task, open_data
from node.exchange.chunks import ChunkExchange
from node.exchange.payload import PayloadFormat
from node.lab.in_process import train_in_process
from node.lab.study.measure import heldout_losses, payload_bytes, stable_ranks
from node.lab.study.scores import far_scores
from node.lab.study.start import Start, save_weights
from node.lab.study.version import code_version
from node.model.exchanged import ExchangedLlama
from node.train.attempt import Metrics
from node.train.from_config import payload_format
from node.train.schedule import StepSchedule

log = logging.getLogger("isthmus.study")

FINAL_TOKENS, CURVE_TOKENS = 1 << 16, 1 << 12
"""Held-out tokens of the last evaluation, and of each earlier one."""
PRETRAINED_TOKENS = 12 << 10, 1 << 11
"""The same where the run starts from a folder's weights: such models are large."""
CURVE_POINTS, PRETRAINED_POINTS = 10, 1
"""Evaluations during training, and the same where the run starts from a folder's weights."""
BINS = 64
"""Spans of the context over which the loss by position is averaged; a chunk is a whole number of them."""
_NO_START = Start()


def run_trial(config: Config, start: Start = _NO_START, keep: Path | None = None) -> dict[str, Any]:
    """Train and measure; the weights go into the file `keep`, if there is one.

    Raises `ConfigError` for a config that cannot run, `RunAborted` where a rank fails.
    """
    began_s, began_cpu_s = time.monotonic(), time.process_time()
    task = open_data(config.data)
    payloads = [payload_format(config) for _ in range(config.assignment().n_ranks)]
    notebook = _Notebook(config, task, payloads[0])
    trainers = train_in_process(config, task, payloads, notebook.note, start.prepare, start.contexts)
    model = trainers[0].model
    if keep is not None:
        save_weights(model, keep)
    tokens = PRETRAINED_TOKENS[0] if config.model.init else FINAL_TOKENS
    losses_DT, asked_DT = notebook.losses(model, config.train.steps, tokens)
    total, count = (losses_DT * asked_DT).sum(0), asked_DT.sum(0)
    return {
        "config": to_tree(config),
        "seed": config.run.seed,
        "heldout_loss": float(total.sum() / count.sum()),
        "heldout_tokens": int(count.sum()),
        "position_loss_sum": _binned(total),
        "position_tokens": _binned(count),
        "documents": far_scores(config.model, task, losses_DT, asked_DT),
        "bytes": payload_bytes(config, payloads[0]),
        "curve": notebook.curve,
        "stable_rank": notebook.stable_rank,
        "wall_s": time.monotonic() - began_s,
        "cpu_s": time.process_time() - began_cpu_s,
        "host": host_line(),
    }


def host_line() -> str:
    """The machine in words."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    return f"{name}, {os.cpu_count()} cores, {platform.system()}, torch {torch.__version__}"


class _Notebook:
    """The measurements made during training."""

    def __init__(self, config: Config, task: Task, payload: PayloadFormat) -> None:
        self.curve: list[dict[str, float]] = []
        self.stable_rank: list[dict[str, Any]] = []
        self._config, self._task = config, task
        self._loss_sum, self._tokens = 0.0, 0.0
        self._exchange = ChunkExchange(assign(config.model.chunks, 1), 0, payload)

    def note(self, model: ExchangedLlama, step: int, metrics: list[Metrics]) -> None:
        """After each step: add to the training loss, and at `CURVE_POINTS` steps evaluate the model."""
        steps = self._config.train.steps
        self._loss_sum += sum(part["loss_sum"] for part in metrics)
        self._tokens += sum(part["tokens"] for part in metrics)
        pretrained = bool(self._config.model.init)
        if step != steps and step % max(1, steps // (PRETRAINED_POINTS if pretrained else CURVE_POINTS)):
            return
        losses_DT, asked_DT = self.losses(model, step, PRETRAINED_TOKENS[1] if pretrained else CURVE_TOKENS)
        entry = {"step": float(step), "heldout_loss": float(losses_DT[asked_DT].mean())}
        if self._tokens:
            entry["loss"] = self._loss_sum / self._tokens
        self.curve.append(entry)
        self.stable_rank.append({"step": step, "layers": stable_ranks(model, self._config.model.layers)})
        self._loss_sum, self._tokens = 0.0, 0.0

    def losses(self, model: ExchangedLlama, step: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Held-out losses (`heldout_losses`) after `step` steps, of about `tokens` tokens, in the mode of that step."""
        config = self._config
        schedule = StepSchedule(config.model, config.compress, config.train)
        spec = schedule.pass_spec(max(1, step))._replace(tokens=config.model.chunk_tokens)
        if step == 0:  # there is no basis yet
            spec = spec._replace(compressed=False)
        batches = max(1, tokens // (config.train.batch * config.model.context))
        return heldout_losses(model, self._exchange, self._task, spec, config.train.batch, batches)


def _binned(values_T: torch.Tensor) -> list[float]:
    return [float(part.sum()) for part in values_T.chunk(min(BINS, len(values_T)))]


def main() -> int:
    """Run the job file's config. The exit code is 2 for a mistake in it and 1 for a failure, as with `isthmus`."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    end_with_parent()
    torch.set_num_threads(1)
    job_path, result_path = Path(sys.argv[1]), Path(sys.argv[2])
    job = json.loads(job_path.read_text())
    if job["code"] != code_version():
        print("error: the code changed while the study ran; start it again", file=sys.stderr)
        return 2
    try:
        config = convert(Config, job["config"])
        weights, keep = (Path(job[key]) if job[key] else None for key in ("weights", "keep"))
        start = Start(weights, job["noise"], job["trunk_steps"] * config.train.batch)
        result = run_trial(config, start, keep)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunAborted as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    named = {key: job[key] for key in ("digest", "code", "trunk")}
    with whole_file(result_path) as unfinished:
        unfinished.write_text(json.dumps(named | result) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
