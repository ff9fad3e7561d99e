"""What the command line of `isthmus doctor` refuses, and what it prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from netem.errors import ConfigError
from node.commands.doctor import Wish, doctor, printable
from node.config import Config, load_config


def wish(**changed: object) -> Wish:
    given: dict[str, object] = {
        "has_config": False,
        "listen": "",
        "nodes": None,
        "join": "",
        "bind": "",
        "advertise": "",
        "name": "",
        "wait_s": 60.0,
        "out": None,
    }
    return Wish(**(given | changed))  # type: ignore[arg-type]


def load(settings: list[str]) -> Config:
    return load_config(None, [*settings, "--coordinator.token=secret"])


LISTEN = "tcp://127.0.0.1:0"


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (wish(), "--listen tcp://INTERFACE:PORT on one machine, and --join"),
        (wish(listen=LISTEN), "--nodes: give the number of machines"),
        (wish(listen=LISTEN, nodes=65), "--nodes: give the number of machines, this one among them: 2 to 64"),
        (wish(listen=LISTEN, nodes=2, wait_s=0.0), "--wait 0: expected more than 0"),
        (wish(listen=LISTEN, nodes=2, wait_s=float("nan")), "--wait nan"),
        (wish(listen=LISTEN, nodes=2, name="a b"), "--name 'a b': expected 1 to 64 letters"),
        (wish(listen=LISTEN, nodes=2, name="coordinator"), "and not 'coordinator'"),
        (wish(listen="7070", nodes=2), "coordinator.address"),
        (wish(join="10.0.0.5:7070"), "--join = '10.0.0.5:7070': expected tcp://HOST:PORT"),
        (wish(join="tcp://no-such-host.invalid:7070"), "the host no-such-host.invalid has no address here"),
        (wish(listen=LISTEN, nodes=2, out=Path("/no/such/folder/x.toml")), "--out /no/such/folder/x.toml"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_option(asked: Wish, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        doctor(load, asked)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_other_machines_say_cannot_steer_the_terminal() -> None:
    assert printable("a → b\n\x1b[2Jc\r\x07") == "a → b\n[2Jc"
