"""`isthmus export`: a checkpoint as a folder that `transformers` loads."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from coordinator.records.folder import step_of
from node.commands.evaluate import checkpoint_config, find_checkpoint


class Exported(NamedTuple):
    """What was written."""

    step: int
    parameters: int
    files: tuple[str, ...]
    note: str


def export(path: Path, folder: Path) -> Exported:
    """Write the model of a checkpoint, or of the last complete one of a run, to a new folder.

    Raises `ConfigError` where the model is no plain Llama (`node.export.plain`), the checkpoint is not sound
    (`node.train.tensor_files`), or the folder is not empty.
    """
    checkpoint = find_checkpoint(path)
    config, step = checkpoint_config(checkpoint), step_of(checkpoint)
    # torch takes seconds to import: a mistyped path should not.
    from node.config.data import RECALL, is_folder
    from node.export.folder import check_free, model_files, write_folder
    from node.export.plain import check_plain, plain_weights, rounding_note
    from node.export.tokenizer import exported_tokenizer, tokenizer_files
    from node.train.checkpoint import load_model, vocab_size_of
    from node.train.finite import require_finite
    from node.train.from_config import drawn_model

    check_free(folder)
    check_plain(config, step)
    vocab_size = vocab_size_of(checkpoint)
    model = drawn_model(config, vocab_size)
    load_model(checkpoint, model)
    weights = plain_weights(config, model, step)
    require_finite(weights, f"{checkpoint}: no export")
    speaks = config.data.corpus != RECALL
    tokenizer = exported_tokenizer(config, vocab_size) if speaks else None
    # A folder's end of text is any of its tokens; that of our own tokenizers is the last.
    end_of_text = tokenizer.eot if is_folder(config.data.tokenizer) and tokenizer else vocab_size - 1
    files = model_files(config.model, vocab_size, end_of_text if speaks else None)
    files |= tokenizer_files(tokenizer, config.model.context) if tokenizer else {}
    write_folder(folder, weights, files, {"run": config.run.name, "step": str(step)})
    parameters = sum(tensor.numel() for tensor in weights.values())
    return Exported(step, parameters, (*files, "model.safetensors"), rounding_note(config))
