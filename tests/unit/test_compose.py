"""docker-compose.yml and the Dockerfile, as far as they can be tried without Docker.

The schema below is strict, and has the part of the Compose specification that we use. Commands are given to our own
command line, which parses them and checks the config that results; that they then run is an end-to-end test.
"""

from __future__ import annotations

import fnmatch
import os
import re
import shlex
from typing import Any

import jsonschema
import pytest
import yaml
from helpers import ROOT

from netem.errors import ConfigError
from node.config import Config, load_config
from node.options import parser

TEXT = (ROOT / "docker-compose.yml").read_text()
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load(TEXT)["services"]
NODES = ("node", "remote-node")

_DURATION = {"type": "string", "pattern": r"^(\d+(ms|s|m|h))+$"}
_STRINGS = {"type": "array", "items": {"type": "string"}, "minItems": 1}


def _closed(required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
        "patternProperties": {"^x-": {}},
    }


SERVICE = _closed(
    required=("image", "build", "command", "healthcheck", "restart", "volumes", "environment"),
    image={"type": "string"},
    build=_closed(("context",), context={"type": "string"}, args={"type": "object"}),
    command=_STRINGS,
    depends_on={
        "type": "object",
        "additionalProperties": _closed(
            ("condition",), condition={"enum": ["service_started", "service_healthy", "service_completed_successfully"]}
        ),
    },
    deploy=_closed(replicas={"type": ["integer", "string"]}),
    environment={"type": "object", "additionalProperties": {"type": ["string", "number", "boolean", "null"]}},
    healthcheck=_closed(
        ("test", "interval", "timeout", "retries"),
        test=_STRINGS,
        interval=_DURATION,
        timeout=_DURATION,
        start_period=_DURATION,
        retries={"type": "integer", "minimum": 1},
    ),
    network_mode={"type": "string", "pattern": "^(host|none|bridge)$"},
    ports={"type": "array", "items": {"type": "string"}, "uniqueItems": True},
    profiles=_STRINGS,
    restart={"enum": ["no", "always", "on-failure", "unless-stopped"]},  # a bare no would be false
    stop_grace_period=_DURATION,
    volumes={"type": "array", "items": {"type": "string"}, "uniqueItems": True},
)
SCHEMA = _closed(
    ("services",),
    name={"type": "string", "pattern": "^[a-z0-9][a-z0-9_-]*$"},
    services={
        "type": "object",
        "patternProperties": {"^[a-zA-Z0-9._-]+$": SERVICE},
        "additionalProperties": False,
    },
    volumes={"type": "object", "additionalProperties": {"type": ["object", "null"]}},
)

_VARIABLE = re.compile(r"\$\{(?P<name>[A-Z_]+)(?:(?P<kind>:[-?])(?P<text>[^}]*))?\}")


def interpolate(text: str, environment: dict[str, str]) -> str:
    """Compose's ${NAME:-default} and ${NAME:?message}."""

    def value(match: re.Match[str]) -> str:
        if given := environment.get(match["name"]):
            return given
        assert match["kind"] == ":-", match[0]
        return match["text"]

    return _VARIABLE.sub(value, text)


def command_of(service: str, **environment: str) -> list[str]:
    return [interpolate(word, environment) for word in SERVICES[service]["command"]]


def config_of(command: list[str]) -> Config:
    """The config that the command's process would have. Raises as the command line does."""
    options, overrides = parser().parse_known_args(command)
    return load_config(options.config, [*overrides, "--coordinator.token=secret"])


@pytest.fixture(autouse=True)
def _at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths in commands are relative to the image's folder, which has configs/ as the repository does."""
    monkeypatch.chdir(ROOT)


def test_the_file_is_what_compose_expects() -> None:
    jsonschema.validate(yaml.safe_load(TEXT), SCHEMA)


def test_every_variable_has_a_default_or_says_what_is_missing() -> None:
    document = yaml.safe_dump(yaml.safe_load(TEXT), width=10_000)  # without comments
    assert document.count("$") == len(_VARIABLE.findall(document))
    for match in _VARIABLE.finditer(document):
        assert match["name"].startswith("ISTHMUS_")
        assert match["text"], match[0]
        assert f"#   {match['name']} " in TEXT, "the head of the file lists all variables"


def test_the_token_is_required_and_only_in_the_environment() -> None:
    for service in SERVICES.values():
        assert service["environment"]["ISTHMUS_TOKEN"].startswith("${ISTHMUS_TOKEN:?")
        assert not any("TOKEN" in word for word in service["command"])
        assert not any("TOKEN" in word for word in service["healthcheck"]["test"])
    assert "TOKEN" not in (ROOT / "Dockerfile").read_text()


@pytest.mark.parametrize("name", SERVICES)
def test_every_command_is_one_of_ours_with_a_config_that_exists(name: str) -> None:
    command = command_of(name)
    assert command[0] in ("coordinator", "node")
    assert (ROOT / command[1]).is_file()
    assert config_of(command).coordinator.nodes == 4


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {
            "ISTHMUS_CONFIG": "configs/tiny.toml",
            "ISTHMUS_NODES": "2",
            "ISTHMUS_PROFILE": "unshaped",
            "ISTHMUS_RUN": "far",
        },
    ],
)
def test_coordinator_and_nodes_agree_whatever_the_environment_says(environment: dict[str, str]) -> None:
    lead = config_of(command_of("coordinator", **environment))
    for name in NODES:
        assert config_of(command_of(name, **environment)).digest() == lead.digest()
    assert interpolate(SERVICES["node"]["deploy"]["replicas"], environment) == str(lead.coordinator.nodes)


def test_a_coordinator_that_others_can_reach_does_not_start_without_a_token() -> None:
    options, overrides = parser().parse_known_args(command_of("coordinator"))
    with pytest.raises(ConfigError, match="token"):
        load_config(options.config, overrides)


def test_nodes_join_where_the_coordinator_listens() -> None:
    port = config_of(command_of("coordinator")).coordinator.address.rpartition(":")[2]
    assert SERVICES["coordinator"]["ports"] == ["${ISTHMUS_PUBLISH:-127.0.0.1}:7070:7070"]
    for name, host in (("node", "coordinator"), ("remote-node", "127.0.0.1")):
        command = command_of(name)
        assert command[command.index("--join") + 1] == f"tcp://{host}:{port}"
    far = command_of("remote-node", ISTHMUS_COORDINATOR="tcp://10.0.0.5:7070", ISTHMUS_INTERFACE="eno1")
    assert far[far.index("--join") + 1] == "tcp://10.0.0.5:7070"
    assert far[far.index("--bind") + 1] == "tcp://eno1:0"


def test_nodes_wait_for_a_coordinator_that_answers() -> None:
    assert SERVICES["node"]["depends_on"] == {"coordinator": {"condition": "service_healthy"}}
    for service in SERVICES.values():
        exec_form, python, option, script = service["healthcheck"]["test"]
        assert (exec_form, python, option) == ("CMD", "python", "-c")
        compile(script, "healthcheck", "exec")


def test_volumes_are_declared_and_lie_where_the_image_made_room() -> None:
    image_folders = re.search(r"mkdir -p (.*) \\", (ROOT / "Dockerfile").read_text())
    assert image_folders is not None
    for service in SERVICES.values():
        for volume in service["volumes"]:
            source, target, *_ = volume.split(":")
            if source.startswith("."):
                assert (ROOT / source).is_dir()
            else:
                assert source in yaml.safe_load(TEXT)["volumes"]
                assert target in image_folders[1].split()


# The Dockerfile.

_INSTRUCTIONS = {"FROM", "ARG", "ENV", "RUN", "WORKDIR", "COPY", "USER", "ENTRYPOINT", "CMD"}


def instructions() -> list[tuple[str, str]]:
    """(keyword, rest) of every instruction, with continued lines joined."""
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    text = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n\s*", " ", text)
    parts = [line.partition(" ") for line in joined.splitlines() if line.strip()]
    return [(keyword, rest.strip()) for keyword, _, rest in parts]


def test_the_dockerfile_has_only_instructions_with_arguments() -> None:
    for keyword, rest in instructions():
        assert keyword in _INSTRUCTIONS, keyword
        assert rest
        if keyword in ("RUN", "COPY", "ENV"):
            shlex.split(rest)  # raises where a quote is open
    assert instructions()[0][0] == "FROM"


def test_the_image_runs_isthmus_as_nobody_in_particular() -> None:
    found = dict(instructions())  # the last of each keyword
    assert found["ENTRYPOINT"] == '["isthmus"]'
    assert found["USER"] == "isthmus"
    assert found["WORKDIR"] == "/isthmus"
    assert [keyword for keyword, _ in instructions()][-3:] == ["USER", "ENTRYPOINT", "CMD"]


def test_what_is_copied_exists_and_is_sent_to_the_builder() -> None:
    sources = [source for keyword, rest in instructions() if keyword == "COPY" for source in rest.split()[:-1]]
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert _is_sent(source), f"{source}: left out by .dockerignore"
    assert not _is_sent(".git")
    assert not _is_sent("outputs")


def test_configs_in_the_image_and_beside_compose_are_the_same_folder() -> None:
    assert ("COPY", "configs configs") in instructions()
    assert all("./configs:/isthmus/configs:ro" in service["volumes"] for service in SERVICES.values())
    assert os.access(ROOT / "configs" / "demo.toml", os.R_OK)


def _is_sent(path: str) -> bool:
    """Whether .dockerignore lets a path at the root pass: the last pattern that fits decides."""
    sent = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.strip()
        if pattern and not pattern.startswith("#") and fnmatch.fnmatchcase(path, pattern.removeprefix("!")):
            sent = pattern.startswith("!")
    return sent
