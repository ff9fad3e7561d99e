"""What a launcher's environment says, and how addresses are found; nothing is started."""

from __future__ import annotations

import socket

import pytest

from netem.errors import ConfigError
from node.cli import main
from node.commands import launch
from node.commands.launch import Spot, address_towards, await_host, settings_of, spot_of
from node.config import load_config


@pytest.mark.parametrize(
    ("environment", "spot"),
    [
        (  # torchrun
            {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "29500"},
            Spot(3, 4, "a", 1),
        ),
        (
            {"SLURM_PROCID": "2", "SLURM_NTASKS": "3", "SLURM_LOCALID": "0", "MASTER_ADDR": "n1"},
            Spot(2, 3, "n1", 0),
        ),
        (  # torchrun within a Slurm task
            {"RANK": "5", "WORLD_SIZE": "8", "SLURM_PROCID": "1", "SLURM_NTASKS": "2", "MASTER_ADDR": "n1"},
            Spot(5, 8, "n1", None),
        ),
        (
            {"JOB_COMPLETION_INDEX": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "isthmus-0.isthmus"},
            Spot(0, 2, "isthmus-0.isthmus", None),
        ),
        ({"RANK": "0", "WORLD_SIZE": "1"}, Spot(0, 1, "127.0.0.1", None)),
        (  # two tasks of a machine, of which each sees one GPU
            {
                "SLURM_PROCID": "1",
                "SLURM_NTASKS": "2",
                "SLURM_LOCALID": "1",
                "MASTER_ADDR": "n1",
                "CUDA_VISIBLE_DEVICES": "3",
            },
            Spot(1, 2, "n1", 0),
        ),
        (
            {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "CUDA_VISIBLE_DEVICES": "0,1,2,3"},
            Spot(5, 8, "a", 1),
        ),
    ],
)
def test_launchers(environment: dict[str, str], spot: Spot) -> None:
    assert spot_of(environment) == spot


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "RANK or SLURM_PROCID or JOB_COMPLETION_INDEX: not in the environment"),
        ({"RANK": "0"}, "WORLD_SIZE or SLURM_NTASKS: not in the environment"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR: not in the environment"),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "rank 2: expected less than"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK = '-1': expected a whole number"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK = 'one'"),
    ],
)
def test_what_is_missing_is_named(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        spot_of(environment)
    assert message in str(error.value)


def test_each_process_of_a_machine_takes_its_own_gpu_unless_one_is_named() -> None:
    spot = Spot(5, 8, "a", 1)
    assert settings_of(spot, load_config(None, ["--run.device=cuda"])) == (
        "--coordinator.nodes=8",
        "--run.device=cuda:1",
    )
    assert settings_of(spot, load_config(None, ["--run.device=cuda:0"])) == ("--coordinator.nodes=8",)
    assert settings_of(spot, load_config(None)) == ("--coordinator.nodes=8",)
    assert settings_of(spot._replace(gpu=None), load_config(None, ["--run.device=cuda"])) == ("--coordinator.nodes=8",)


def test_a_name_that_comes_late_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [socket.gaierror("not yet"), socket.gaierror("not yet"), []]
    asked: list[str] = []

    def look_up(host: str, port: None) -> list[object]:
        asked.append(host)
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(launch, "RETRY_S", 0.001)
    monkeypatch.setattr(launch.socket, "getaddrinfo", look_up)
    await_host("isthmus-0.isthmus", 5.0)
    assert asked == ["isthmus-0.isthmus"] * 3
    answers[:] = [socket.gaierror("no such name")] * 100
    with pytest.raises(ConfigError, match="MASTER_ADDR = gone: has no address here after 0"):
        await_host("gone", 0.0)


def test_the_way_to_this_machine_is_its_loopback() -> None:
    assert address_towards("127.0.0.1", 7070) == "127.0.0.1"


def test_without_a_launcher_it_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in (*launch.RANK, *launch.WORLD_SIZE):
        monkeypatch.delenv(name, raising=False)
    assert main(["launch", "configs/tiny.toml"]) == 2
    assert "isthmus launch: error: RANK or SLURM_PROCID" in capsys.readouterr().err
