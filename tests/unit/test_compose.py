"""docker-compose.yml and the Dockerfile, as far as they can be tried without Docker.

The schema below is strict, and has the part of the Compose specification that we use. Commands are given to our own
command line, which parses them and checks the config that results; that they then run is an end-to-end test.
"""

from __future__ import annotations

import fnmatch
import os
import re
import shlex
import socket
import subprocess
import sys
from typing import Any

import jsonschema
import pytest
import yaml
from helpers import ROOT

from netem.errors import ConfigError
from node.config import Config, load_config
from node.options import parse, parser, split_settings

TEXT = (ROOT / "docker-compose.yml").read_text()
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load(TEXT)["services"]
NODES = ("node", "remote-node")
GPU: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.gpu.yml").read_text())

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
    required=("image", "build", "command", "healthcheck", "init", "restart", "volumes", "environment"),
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
    init={"type": "boolean"},
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


@pytest.mark.parametrize("name", ["docker-compose.yml", "docker-compose.gpu.yml"])
def test_every_variable_has_a_default_so_that_logs_and_down_need_none(name: str) -> None:
    text = (ROOT / name).read_text()
    document = yaml.safe_dump(yaml.safe_load(text), width=10_000).replace("$$", "")  # without comments
    assert document.count("$") == len(_VARIABLE.findall(document))
    for match in _VARIABLE.finditer(document):
        assert match["name"].startswith("ISTHMUS_")
        assert match["kind"] == ":-", match[0]
        assert f"#   {match['name']} " in text, "the head of the file lists all variables"


def test_the_token_is_only_in_the_environment() -> None:
    for service in SERVICES.values():
        assert service["environment"]["ISTHMUS_TOKEN"] == "${ISTHMUS_TOKEN:-}"
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
    assert SERVICES["node"]["depends_on"] == {"coordinator": {"condition": "service_started"}}
    for name, host in (("node", "coordinator"), ("remote-node", "127.0.0.1")):
        command = command_of(name)
        assert command[command.index("--join") + 1] == f"tcp://{host}:{port}"
    far = command_of("remote-node", ISTHMUS_COORDINATOR="tcp://10.0.0.5:7070", ISTHMUS_INTERFACE="eno1")
    assert far[far.index("--join") + 1] == "tcp://10.0.0.5:7070"
    assert far[far.index("--bind") + 1] == "tcp://eno1:0"


def test_a_remote_node_is_told_its_port_and_its_address_behind_nat() -> None:
    options, _ = parse(command_of("remote-node"))
    assert (options.bind, options.advertise) == ("tcp://eth0:0", "")
    options, _ = parse(command_of("remote-node", ISTHMUS_PORT="7071", ISTHMUS_ADVERTISE="203.0.113.7:9000"))
    assert (options.bind, options.advertise) == ("tcp://eth0:7071", "203.0.113.7:9000")


def is_healthy(service: str, port: int, coordinator: str = "") -> bool:
    """What the service's check of health says on this machine, whose coordinator has this port."""
    form, script = SERVICES[service]["healthcheck"]["test"]
    assert form == "CMD-SHELL"
    script = script.replace("$$", "$").replace(":1B9E ", f":{port:04X} ")
    variables = {"PATH": os.environ["PATH"], "COORDINATOR": coordinator}
    done = subprocess.run(["sh", "-c", script], env=variables, capture_output=True, text=True, timeout=10)
    assert done.stderr == ""
    return done.returncode == 0


@pytest.mark.skipif(sys.platform != "linux", reason="the containers have Linux's /proc")
@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_health_is_read_from_the_kernels_table(family: socket.AddressFamily) -> None:
    with socket.socket(family) as listener:
        try:
            listener.bind(("127.0.0.1" if family == socket.AF_INET else "::1", 0))
        except OSError:
            pytest.skip("this machine has no IPv6")
        port = listener.getsockname()[1]
        where = f"tcp://coordinator:{port}"
        assert not is_healthy("coordinator", port), "bound, and not listening yet"
        listener.listen()
        assert is_healthy("coordinator", port)
        assert not is_healthy("node", port, where)
        with socket.create_connection(listener.getsockname()[:2]):
            assert is_healthy("node", port, where)
            assert is_healthy("remote-node", port, where)
    assert not is_healthy("coordinator", port)


def test_the_checks_of_health_start_no_python_and_are_rare() -> None:
    for service in SERVICES.values():
        assert "python" not in " ".join(service["healthcheck"]["test"])
        assert service["healthcheck"]["interval"] == "30s"
    assert SERVICES["node"]["environment"]["COORDINATOR"] == "tcp://coordinator:7070"
    far = command_of("remote-node", ISTHMUS_COORDINATOR="tcp://10.0.0.5:7171")
    told = SERVICES["remote-node"]["environment"]["COORDINATOR"]
    assert far[far.index("--join") + 1] == interpolate(told, {"ISTHMUS_COORDINATOR": "tcp://10.0.0.5:7171"})


def test_the_file_for_gpus_changes_the_device_and_nothing_that_must_be_equal() -> None:
    assert GPU["services"].keys() == SERVICES.keys()
    for name in NODES:
        service = GPU["services"][name]
        words, settings = split_settings([*service["entrypoint"][1:], *command_of(name)])
        options = parser().parse_args(words)
        config = load_config(options.config, [*settings, "--coordinator.token=secret"])
        assert service["entrypoint"][0] == "isthmus"
        assert config.run.device == "cuda"
        assert config.digest() == config_of(command_of("coordinator")).digest()
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert device["capabilities"] == ["gpu"]
        assert not {"command", "environment", "volumes"} & service.keys()
    assert {service["image"] for service in GPU["services"].values()} == {"isthmus-cuda"}


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
