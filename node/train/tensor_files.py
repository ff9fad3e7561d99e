"""The files of a checkpoint: safetensors, written whole or not at all, and trusted only once they have been checked.

A file is sound where it is what was written (its digest fits, `node.train.file_digest`), all its tensors are finite, it
is of its folder's step, and it was trained on the corpus at hand. Tensors only; nothing is unpickled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from coordinator.records.folder import is_complete, step_of, whole_file
from netem.errors import ConfigError, IsthmusError
from node.train.file_digest import DIGEST, Content, check_digest, digest_of
from node.train.finite import first_nonfinite

MODEL = "model.safetensors"
CORPUS = "corpus"
"""The key of the corpus's fingerprint in a file's metadata."""

TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What safetensors calls the types that a checkpoint may hold."""


def write_tensors(tensors: dict[str, Tensor], path: Path, about: dict[str, str]) -> None:
    """Write a file and its folder. Raises `IsthmusError` where the disk fails, as for lack of room.

    The tensors are contiguous and on the CPU. What a killed process has left of this file is removed.
    """
    about = {"format": "pt", **about}
    about[DIGEST] = digest_of(about, (_content(name, tensor) for name, tensor in sorted(tensors.items())))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f".{path.name}.*"):
            left.unlink(missing_ok=True)
        with whole_file(path, durable=True) as unfinished:
            save_file(tensors, unfinished, metadata=about)
    except (safetensors.SafetensorError, OSError) as error:
        raise IsthmusError(f"{path}: cannot be written: {error}") from None


def read_sound(path: Path, corpus: str = "") -> dict[str, Tensor]:
    """The tensors of one node's part, or of the model. Raises `ConfigError` where the file is not sound.

    An empty `corpus` is not compared, nor is one with a file that names none.
    """
    tensors, about = _read(path)
    try:
        check_digest(path)
    except ConfigError as error:
        raise ConfigError(f"{error}; {_advice(path)}") from None
    said, expected = about.get("step"), step_of(path.parent)
    if said is not None and said != str(expected):
        raise ConfigError(
            f"{path}: is of step {said}, and its folder of step {expected}; give the folder its name back"
        )
    if name := first_nonfinite(tensors):
        raise ConfigError(f"{path}: {name} is not finite; {_advice(path)}")
    trained_on = about.get(CORPUS, corpus)
    if corpus and trained_on != corpus:
        raise ConfigError(
            f"{path}: was trained on another corpus (fingerprint {trained_on[:12]}, here {corpus[:12]}): data.* is set "
            "otherwise, or the text has changed since; give the text that it was trained on"
        )
    return tensors


def vocab_size_in(path: Path) -> int:
    """How many tokens a model's file knows: the rows of its embedding. Raises `ConfigError`."""
    with _opened(path) as tensors:
        if "embed_tokens.weight" not in tensors.keys():  # noqa: SIM118 (a safetensors file is no mapping)
            raise ConfigError(f"{path}: holds no embed_tokens.weight; it is no checkpoint of this project")
        return int(tensors.get_slice("embed_tokens.weight").get_shape()[0])


def _content(name: str, tensor: Tensor) -> Content:
    assert tensor.is_contiguous(), f"{name} is not contiguous"
    data = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    return Content(name, TYPES[tensor.dtype], tensor.shape, [data])


def _advice(path: Path) -> str:
    """Which checkpoint before this one to use, and how."""
    folder = path.parent
    earlier = [other for other in folder.parent.glob("step-*") if 0 <= step_of(other) < step_of(folder)]
    for other in sorted(filter(is_complete, earlier), key=step_of, reverse=True):
        with suppress(ConfigError):
            check_digest(other / path.name)
            tensors, _ = _read(other / path.name)
            if not first_nonfinite(tensors):
                return f"{other} is sound: use it, or move {folder} away and resume from there"
    return "no checkpoint before it is sound; train anew with a lower train.lr"


def _read(path: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safetensors.safe_open(path, "pt") as file:
            yield file
    except FileNotFoundError:
        if path.name == MODEL:
            raise ConfigError(f"{path}: is missing; the node of rank 0 wrote it on its own machine") from None
        raise ConfigError(f"{path}: is missing; every node resumes from the file that it wrote itself") from None
    except (safetensors.SafetensorError, OSError) as error:
        raise ConfigError(f"{path}: not a whole safetensors file: {error}") from None
