"""[run]: what the run is called, where it writes, what it computes on."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta

from netem.config import Section, user_path
from netem.errors import ConfigError

MOST_TRACED = 100
"""Steps that may be traced, at most: a trace holds every span and message of a step."""


class RunConfig(Section, frozen=True, kw_only=True):
    """[run]: what the run is called, where it writes, what it computes on."""

    name: Annotated[str, Meta(description="Name of the run. Its folder is run.outputs/NAME.", min_length=1)] = "run"
    outputs: Annotated[str, Meta(description="Folder in which each run gets a folder; ~ is your home.")] = "outputs"
    seed: Annotated[
        int,
        Meta(description="Seed of the initial weights, the batches and the random rotations.", ge=0, le=(1 << 63) - 1),
    ] = 0
    device: Annotated[str, Meta(description="What a node computes on: cpu, cuda or cuda:N. On cuda, in bfloat16.")] = (
        "cpu"
    )
    threads: Annotated[
        int,
        Meta(
            description="CPU threads of each node. 0: the nodes of one machine share out the cores that they may use.",
            ge=0,
        ),
    ] = 0
    recompute: Annotated[
        bool,
        Meta(
            description="Activation checkpointing: keep of each layer only its input, its attention's output and the "
            "payloads that arrived, and compute the rest again in the backward. It saves memory and sends nothing "
            "twice. Nodes may differ in it."
        ),
    ] = False
    resume: Annotated[bool, Meta(description="Go on from the last complete checkpoint in the run's folder.")] = False
    trace: Annotated[
        str,
        Meta(description="Steps of which each node writes a trace for isthmus trace: 40, or 40..42; empty: none."),
    ] = ""

    profile: Annotated[
        str,
        Meta(description="Steps of which each node writes torch's own profile, as run.trace; empty: none."),
    ] = ""
    tracker: Annotated[
        Literal["", "wandb", "trackio"],
        Meta(description="Experiment tracker that gets the run's figures too, beside TensorBoard; empty: none."),
    ] = ""

    def check(self, path: str) -> None:
        self.traced(path)
        self.profiled(path)
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise ConfigError(f"{path}device = {self.device!r}: expected cpu, cuda or cuda:N")
        if "/" in self.name or self.name in (".", "..") or not self.name.isprintable() or len(self.name) > 64:
            raise ConfigError(
                f"{path}name = {self.name!r}: expected a plain folder name, without slashes, of at most 64 characters"
            )

    def traced(self, path: str = "run.") -> range:
        """The steps that `trace` names. Raises `ConfigError` where it names none."""
        return _steps(f"{path}trace", self.trace)

    def profiled(self, path: str = "run.") -> range:
        """The steps that `profile` names. Raises `ConfigError` where it names none."""
        return _steps(f"{path}profile", self.profile)

    @property
    def folder(self) -> Path:
        """Where everything of this run is written."""
        return user_path(self.outputs, "run.outputs") / self.name


def _steps(key: str, text: str) -> range:
    if not text:
        return range(0)
    match = re.fullmatch(r"([1-9]\d{0,11})(?:\.\.([1-9]\d{0,11}))?", text, re.ASCII)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if not first <= last < first + MOST_TRACED:
        raise ConfigError(
            f"{key} = {text!r}: expected a step or a range of at most {MOST_TRACED} steps, such as 40 or 40..42"
        )
    return range(first, last + 1)
