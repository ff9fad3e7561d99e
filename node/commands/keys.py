"""`isthmus keys`: the keys of a run, in files that only their owner can read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from coordinator.keyring import COORDINATOR_FILE, OPERATOR_FILE, make_keys
from coordinator.messages import COORDINATOR, NODE_NAME
from netem.errors import ConfigError

MOST = 4096


def write_keys(folder: Path, nodes: int, names: Sequence[str]) -> None:
    """Make the keys, and print what each file is for. Raises `ConfigError`."""
    if not 0 <= nodes <= MOST:
        raise ConfigError(f"--nodes {nodes}: expected 0 to {MOST}")
    wanted = [*(f"node-{rank}" for rank in range(nodes)), *names]
    for name in names:
        if not re.fullmatch(NODE_NAME, name) or name in (COORDINATOR, "operator") or wanted.count(name) > 1:
            raise ConfigError(f"--name {name!r}: expected a node's name that is not given twice, nor used by a file")
    if not wanted:
        raise ConfigError("expected --nodes or --name: each node needs an invitation")
    for path in make_keys(folder, wanted):
        print(f"{path}: {_USES.get(path.name, 'for one node, as coordinator.keys')}")


_USES = {
    COORDINATOR_FILE: "for the coordinator, as coordinator.keys; remove a line of [nodes] to take an invitation back",
    OPERATOR_FILE: "for you: isthmus net set --key",
}
