"""`isthmus net set | cut | heal | reset | show`: the network of a run that goes on, changed or shown."""

from __future__ import annotations

import os
from pathlib import Path

from coordinator.keyring import OperatorKeys, operator_pair, read_keys
from coordinator.messages import COORDINATOR, Answer
from coordinator.operator import ask
from coordinator.records.folder import ADDRESS, read_address
from coordinator.records.secret import secret_path
from netem.changes import Change, ChangeConfig, change_of
from netem.errors import ConfigError
from netem.keys import derived_pair, new_pair
from netem.sockets import check_host, parse_address
from netem.units import format_time
from node.config import OPERATOR_VARIABLE, TOKEN_VARIABLE


def change_network(where: str, key: Path | None, config: ChangeConfig | None) -> int:
    """Ask the coordinator of the run at `where` (an address, or the run's folder here), and print what it answers.

    The operator's key is in the file `key`; with None it is looked for in the run's folder, and then made from the
    secrets in the environment. `config` None only shows. The exit code is 0 where every node knows of the change, and 1
    where some have not confirmed it. Raises `ConfigError`.
    """
    change = None if config is None else change_of(config, "--")
    answer = ask(address_of(where, "--coordinator"), keys_of(where, key), change)
    print(as_text(answer, change))
    return 1 if answer.silent else 0


def as_text(answer: Answer, change: Change | None) -> str:
    """The answer for people."""
    when = f"{format_time(round(answer.at_s, 3))} after the start, at step {answer.step}"
    lines = [f"changed:     {change}, {when}"] if change is not None else [f"time:        {when}"]
    lines.append(f"network:     {answer.network}")
    if answer.confirmed:
        lines.append(f"confirmed:   {', '.join(sorted(answer.confirmed))}")
    if answer.silent:
        lines.append(f"no word yet: {', '.join(sorted(answer.silent))} (changes as soon as it hears)")
    if change is None:
        lines += [f"until now:   {text}" for text in answer.past] + [f"to come:     {text}" for text in answer.coming]
    return "\n".join(lines)


def keys_of(where: str, key: Path | None, *, watches: bool = False) -> OperatorKeys:
    """The operator's key of the run at `where`; to watch it, any key will do with the token.

    Raises `ConfigError` where there is none.
    """
    if key is not None:
        return read_keys(OperatorKeys, key, "--key")
    if not where.startswith("tcp://") and (kept := secret_path(Path(where))) is not None:
        return read_keys(OperatorKeys, kept, "--coordinator")
    secret = os.environ.get(OPERATOR_VARIABLE, "")
    lead = derived_pair(os.environ.get(TOKEN_VARIABLE, ""), COORDINATOR).public
    if watches and not secret:
        return OperatorKeys(coordinator=lead, secret=new_pair().secret)
    if not secret:
        raise ConfigError(
            f"{where}: the operator's secret is missing; give the run's folder on the coordinator's machine while the "
            f"run goes on, or a key with --key FILE, or {OPERATOR_VARIABLE} and {TOKEN_VARIABLE} as the coordinator "
            "has them"
        )
    return OperatorKeys(coordinator=lead, secret=operator_pair(secret).secret)


def address_of(where: str, key: str) -> str:
    """The coordinator's address, which `where` is or which its folder holds. Raises `ConfigError` that names `key`."""
    if not where.startswith("tcp://"):
        if not (Path(where) / ADDRESS).exists():
            raise ConfigError(
                f"{key} {where}: expected the coordinator's address, such as tcp://10.0.0.5:7070, "
                "or the folder of a run that goes on here, such as outputs/demo"
            )
        where = read_address(Path(where))
    check_host(parse_address(where, key, dial=True), f"{key} {where}")
    return where
