"""[run]: what the run is called, where it writes, what it computes on."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from msgspec import Meta

from netem.config import Section, user_path
from netem.errors import ConfigError


class RunConfig(Section, frozen=True, kw_only=True):
    """[run]: what the run is called, where it writes, what it computes on."""

    name: Annotated[str, Meta(description="Name of the run; its folder is outputs/NAME.", min_length=1)] = "run"
    outputs: Annotated[str, Meta(description="Folder that receives the folders of runs.")] = "outputs"
    seed: Annotated[int, Meta(description="Seed of weights, batches and rotations.", ge=0, le=(1 << 63) - 1)] = 0
    device: Annotated[str, Meta(description="cpu, cuda, or cuda:N. On cuda the compute runs in bf16.")] = "cpu"
    threads: Annotated[int, Meta(description="CPU threads of each node; 0 leaves it to torch.", ge=0)] = 0
    resume: Annotated[bool, Meta(description="Go on from the last complete checkpoint of outputs/NAME.")] = False

    def check(self, path: str) -> None:
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise ConfigError(f"{path}device = {self.device!r}: expected cpu, cuda or cuda:N")
        if "/" in self.name or self.name in (".", "..") or not self.name.isprintable() or len(self.name) > 64:
            raise ConfigError(
                f"{path}name = {self.name!r}: expected a plain folder name, without slashes, of at most 64 characters"
            )

    @property
    def folder(self) -> Path:
        """Where everything of this run is written."""
        return user_path(self.outputs, "run.outputs") / self.name
