"""The configuration of a run: one tree, a file a section.

`tree` joins them and reads, saves and digests the whole. `run`, `model`, `compress`, `train` and `data` are the node
floor's sections; `[net]` is netem's and `[coordinator]` the coordinator's. `seeds` derives one random stream for each
purpose from `run.seed`. `presets` are named sets of settings, and lie under the file. `stages` deals layers to pipeline
stages. No torch here.
"""

from node.config.compress import CompressConfig, FormatName
from node.config.data import DataConfig
from node.config.model import ModelConfig
from node.config.run import RunConfig
from node.config.train import TrainConfig
from node.config.tree import (
    OPERATOR_VARIABLE,
    TOKEN_VARIABLE,
    Config,
    load_config,
    public_toml,
    public_tree,
    recorded_config,
    save_config,
    to_tree,
)

__all__ = [
    "OPERATOR_VARIABLE",
    "TOKEN_VARIABLE",
    "CompressConfig",
    "Config",
    "DataConfig",
    "FormatName",
    "ModelConfig",
    "RunConfig",
    "TrainConfig",
    "load_config",
    "public_toml",
    "public_tree",
    "recorded_config",
    "save_config",
    "to_tree",
]
