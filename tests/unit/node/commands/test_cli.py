"""The command line: a mistake is one line and exit code 2, in the same process, without a traceback."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from helpers import ROOT
from helpers.command_line import TINY, mistake

import node.cli
from coordinator.messages import NODE_NAME
from netem.config import convert, flat
from netem.errors import ConfigError, ProtocolError, RunAborted
from netem.profile import resolve
from node.cli import main
from node.commands.node import default_name
from node.config import Config, load_config
from node.config.presets import load_preset, preset_names


@pytest.mark.parametrize(
    "command", ["run", "coordinator", "node", "launch", "chaos", "data prepare", "plan", "tunnel --target"]
)
def test_every_command_takes_a_config_by_its_name(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The name of one in configs/, unless there is a file called that; a path is a path."""
    monkeypatch.chdir(ROOT)

    def name_of(config: str) -> str:
        assert main([*command.split(), config, "--print-config"]) == 0
        return str(tomllib.loads(capsys.readouterr().out)["run"]["name"])

    assert name_of("tiny") == name_of("configs/tiny.toml") == "tiny"
    expected = "huge: no such config; configs/ has demo, figure, paper-3b, paper-800m, tiny; give one of them, or the"
    assert expected in mistake([*command.split(), "huge", "--print-config"], capsys)
    assert "configs/huge: no such file" in mistake([*command.split(), "configs/huge", "--print-config"], capsys)
    (tmp_path / "tiny").write_text("run.name = 'own'\ncoordinator.nodes = 2\nnet.rate = '1 Mbit/s'\n")
    monkeypatch.chdir(tmp_path)
    assert name_of("tiny") == "own"


@pytest.mark.parametrize("command", ["run", "coordinator", "node"])
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["none.toml"], "none.toml: no such file; give the path of a TOML config"),
        (["."], ".: is a folder; give the path of a TOML file"),
        ([TINY, "--model.chunkz", "4"], "model.chunkz = 4: unknown key; did you mean chunks?"),
        ([TINY, "--modle.chunks=4"], "modle: unknown key; did you mean model?"),
        ([TINY, "--train.steps", "many"], 'train.steps = "many": expected a whole number, not text'),
        ([TINY, "--train.lr", "-1"], "train.lr = -1: expected a number above 0"),
        ([TINY, "--model.context", "1000", "--model.chunks", "3"], "model.context = 1000: does not divide into"),
        ([TINY, "--coordinator.nodes", "5"], "coordinator.nodes = 5: more nodes than chunks (4)"),
        ([TINY, "--train.steps"], "--train.steps: a value is missing; write --train.steps VALUE"),
        ([TINY, "also.toml"], "also.toml: not understood; a setting is given as --section.key VALUE"),
        ([TINY, "--train.lr", "inf"], "train.lr = inf: expected a finite number"),
        ([TINY, "--net.rate", "0.001 bit/s"], "net.rate = '0.001 bit/s': expected a rate of at least '1 kbit/s'"),
        ([TINY, "--net.latency", "2 months"], "net.latency = '2 months': 'months' is not a unit here"),
        ([TINY, "--coordinator.join_timeout_s", "1e9"], "expected a number of at most 31536000"),
        (
            [TINY, "--preset", "hom"],
            "--preset 'hom': no such preset; there are datacenter, exact, home, paper; did you",
        ),
        ([TINY, "--run.device", "tpu"], "run.device = 'tpu': expected cpu, cuda or cuda:N"),
        ([TINY, "--coordinator.address", "tcp://0.0.0.0:7070"], "name one interface"),
        ([TINY, "--coordinator.address", "tcp://eth0:7070"], "give a secret token"),
        (
            [TINY, "--coordinator.stages", "2", "--model.tied=false", "--train.pipeline=gpipe"],
            "coordinator.stages = 2: expected 1; isthmus plan and isthmus tunnel know pipelines, and no run has them",
        ),
    ],
    ids=lambda value: " ".join(Path(word).name for word in value) if isinstance(value, list) else "",
)
def test_a_mistake_in_the_config(
    command: str, arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    join = ["--join", "tcp://127.0.0.1:1"] if command == "node" else []
    assert expected in mistake([command, *arguments, *join], capsys)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["eval", "outputs/none"], "outputs/none: no such folder; give outputs/RUN, or outputs/RUN/checkpoint/step-N"),
        (["eval", "."], ".: holds no complete checkpoint"),
        (["report", "outputs/none"], "outputs/none"),
        (["report", "one", "two"], "--out: several runs go into one picture"),
        (["report", "one", "--train.steps", "5"], "--train.steps 5: not understood; see isthmus report --help"),
        (
            ["settings", "modle"],
            "modle: no such section; there are compress, coordinator, data, model, net, run, train",
        ),
        (["settings", "--preset", "hom"], "--preset 'hom': no such preset"),
        (
            ["net", "set", "--coordinator", "x", "--rate", "1e9 Tbit/s"],
            "--rate = '1e9 Tbit/s': expected a rate of at most",
        ),
        (
            ["net", "set", "--coordinator", "x", "--latency", "2000 min"],
            "--latency = '2000 min': expected a time of at most",
        ),
        (["node", TINY], "--join: give the coordinator's address, such as tcp://10.0.0.5:7070"),
        (["study", "--print-config"], "NAME: name a study"),
        (["node", TINY, "--join", "10.0.0.5:7070"], "--join '10.0.0.5:7070': expected the coordinator's address"),
        (["node", TINY, "--join", "tcp://127.0.0.1:*"], "--join = 'tcp://127.0.0.1:*': expected one host and one port"),
        (["node", TINY, "--join", "tcp://127.0.0.1:1", "--name", "a b"], "--name 'a b': expected 1 to 64 letters"),
        (["node", TINY, "--join", "tcp://127.0.0.1:1", "--name", "x" * 65], "expected 1 to 64 letters"),
        (["node", TINY, "--join", "tcp://127.0.0.1:1", "--name", "coordinator"], "and not 'coordinator'"),
        (["coordinator", TINY, "--run.name", "x" * 65], "expected a plain folder name, without slashes, of at most 64"),
        (["coordinator", TINY, "--run.resume", "true"], "run.resume = true: outputs/tiny holds no complete checkpoint"),
    ],
    ids=lambda value: " ".join(Path(word).name for word in value) if isinstance(value, list) else "",
)
def test_a_mistake_of_one_command(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert expected in mistake(arguments, capsys)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model.context", "4000000", "--model.chunks", "4"], "needs 4000001"),
        (["--net.profile", "dial-up"], "no such profile"),
        (["--data.corpus", "no/such.txt"], "no/such.txt"),
        (["--run.resume", "true", "--run.name", "never-ran"], "no complete checkpoint"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_a_mistake_that_a_run_finds_before_it_starts_any_process(
    arguments: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert expected in mistake(["run", TINY, "--run.outputs", str(tmp_path), *arguments], capsys)
    assert list(tmp_path.iterdir()) == []


def test_two_nodes_without_a_name_or_rank_have_two_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "the host's own, " + "very " * 20 + "long name")
    names = {default_name(-1) for _ in range(2)}
    assert len(names) == 2
    assert all(re.fullmatch(NODE_NAME, name) for name in names)
    assert default_name(3) == "node-3"


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigError("x = 1: expected 2"), 2, "isthmus settings: error: x = 1: expected 2"),
        (RunAborted("node-3 is lost"), 1, "isthmus settings: node-3 is lost"),
        (ProtocolError("spoke nonsense", peer="node-2"), 1, "isthmus settings: node-2: spoke nonsense"),
        (KeyboardInterrupt(), 130, "isthmus settings: interrupted"),
    ],
)
def test_exit_codes(
    error: BaseException, code: int, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setitem(node.cli._COMMANDS, "settings", fail)
    assert main(["settings"]) == code
    assert capsys.readouterr().err.splitlines() == [line]


def test_a_fault_of_our_own_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("ours")

    monkeypatch.setitem(node.cli._COMMANDS, "settings", fail)
    with pytest.raises(AssertionError, match="ours"):
        main(["settings"])


@pytest.mark.parametrize(
    "arguments", [[], ["train"], ["run"], ["completion", "ksh"], ["node", TINY, "--join", "a", "--rank", "x"]]
)
def test_what_argparse_refuses_ends_with_code_2_too(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: isthmus" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["", "run", "coordinator", "node", "eval", "report", "settings", "completion"])
def test_help_of_every_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"] if command else ["--help"])
    assert caught.value.code == 0
    assert f"usage: isthmus {command}".strip() in capsys.readouterr().out


@pytest.mark.parametrize("command", [["node", TINY, "--join"], ["net", "show", "--coordinator"]])
def test_a_host_that_has_no_address_is_named_at_once(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lookup(host: str, _port: None) -> None:
        raise socket.gaierror(socket.EAI_NONAME, f"no {host} in the phone book")

    monkeypatch.setattr("netem.sockets.getaddrinfo", lookup)
    expected = (
        "tcp://coordinator.invalid:7070: the host coordinator.invalid has no address here (no coordinator.invalid"
    )
    assert expected in mistake([*command, "tcp://coordinator.invalid:7070"], capsys)


def test_settings_explains_presets_first_and_lists_every_key_with_its_default(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["settings"]) == 0
    everything = capsys.readouterr().out
    for text in ("[run]", "[coordinator]", "train.sync_every", "20", "Steps between averagings", "net.profile"):
        assert text in everything
    presets, _, _ = everything.partition("[run]")
    assert "defaults < preset < config file < command line" in presets
    assert all(f"\n  {name} " in presets for name in preset_names())
    assert main(["settings", "model"]) == 0
    out = capsys.readouterr().out
    assert "[train]" not in out
    assert "preset" not in out


def test_settings_of_a_preset(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["settings", "--preset", "home"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Nodes in homes")
    facts = {line.split()[0]: line.split(maxsplit=2)[1:] for line in lines if line.startswith("  ")}
    assert facts["train.sync_every"] == ["100", f"default: {Config().train.sync_every}"]
    assert facts.keys() == set(flat(load_preset("home").tree))
    assert main(["settings", "net", "--preset", "home"]) == 0
    assert "compress.format" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "command",
    [
        ["run", TINY],
        ["coordinator", TINY],
        ["node", TINY],
        ["plan", TINY, "--nodes", "2"],
        ["tunnel", "--target", TINY],
    ],
    ids=lambda words: words[0],
)
def test_the_resolved_config_is_printed_without_secrets(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ISTHMUS_TOKEN", "s3cret")
    assert main([*command, "--preset", "home", "--train.steps", "77", "--print-config"]) == 0
    out = capsys.readouterr().out
    assert "s3cret" not in out
    config = convert(Config, tomllib.loads(out))
    assert (config.train.steps, config.compress.format, config.model.layers) == (77, "int8", 3)
    same = ["--train.steps", "77", "--coordinator.address", config.coordinator.address]
    if command[0] == "tunnel":
        same += ["--coordinator.relay", "never"]  # the tunnel scales none, and the preset leaves the choice open
    assert config == load_config(Path(TINY), same, "home")


def test_the_resolved_configs_of_a_study_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "control", "--preset", "home", "--train.steps", "77", "--print-config"]) == 0
    arms = {name: convert(Config, tree) for name, tree in tomllib.loads(capsys.readouterr().out)["arms"].items()}
    assert {"dense", "local-only"} <= arms.keys()
    assert all((arm.train.steps, arm.train.sync_every) == (77, 100) for arm in arms.values())
    assert arms["dense"].compress.dense_last_layers == 1  # the base's, over the preset's


def test_what_the_file_changes_of_a_preset_is_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    assert main(["run", TINY, "--preset", "exact", "--print-config"]) == 0
    assert caplog.messages == [f"preset exact: {TINY} takes precedence with train.sync_every = 20, not 1"]
    caplog.clear()
    assert main(["run", TINY, "--preset", "exact", "--train.sync_every", "1", "--print-config"]) == 0
    assert caplog.messages == []


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert re.fullmatch(r"isthmus \d+\.\d+\.\d+\S* \(Python 3\.\S+, torch \S+\)\n", capsys.readouterr().out)


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_knows_commands_options_settings_and_presets(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    options = ("print-config", "train.steps", "compress.mode", "net.profile")
    for word in ("tunnel", "heal", *options, *preset_names(), "geodesic"):
        assert word in script
    assert "coordinator.token" not in script


def test_bash_completes_settings_and_their_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    (tmp_path / "isthmus.bash").write_text(capsys.readouterr().out)
    ask = """
        source isthmus.bash
        COMP_WORDS=("$@"); COMP_CWORD=$(($#-1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}
        _shtab_isthmus isthmus "${@: -1}" "${@: -2:1}"; echo "${COMPREPLY[@]}"
    """

    def completed(*words: str) -> str:
        done = subprocess.run(
            ["bash", "-c", ask, "bash", "isthmus", *words], capture_output=True, text=True, timeout=20, cwd=tmp_path
        )
        return done.stdout.strip()

    assert completed("run", "--train.st") == "--train.steps"
    assert completed("run", "a.toml", "--compress.mode", "") == "subspace dense local"
    assert completed("run", "a.toml", "--preset", "h") == "home"
    assert completed("net", "verify", "--train.st") == ""


def test_home_is_expanded_in_every_path_of_the_config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "lte.toml").write_bytes(b'\xef\xbb\xbfrate = "10 Mbit/s"\n')
    config = load_config(Path(TINY), ["--run.outputs", "~/runs", "--net.profile", "~/lte.toml"])
    assert config.run.folder == tmp_path / "runs" / "tiny"
    assert resolve(config.net).rate_bps == 10e6


@pytest.mark.parametrize("words", [["--coordinator.token", "s3cret"], ["--coordinator.operator=s3cret"]])
def test_a_secret_on_the_command_line_is_refused_and_not_repeated(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["coordinator", TINY, *words]) == 2
    said = capsys.readouterr().err
    assert "every user of this machine can read a command line" in said
    assert "s3cret" not in said


def test_the_token_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not from the command line, where `ps` shows it."""
    seen: list[Config] = []
    monkeypatch.setattr("node.commands.coordinator.run_coordinator", lambda config, page: seen.append(config))
    monkeypatch.setenv("ISTHMUS_TOKEN", "s3cret")
    assert main(["coordinator", TINY, "--coordinator.address", "tcp://eth0:7070"]) == 0
    assert seen[0].coordinator.token == "s3cret"


def test_a_run_begins_and_a_mistake_is_said_before_torch_is_imported() -> None:
    code = "import sys; from node.cli import main; import node.commands.run; code = main(sys.argv[1:])"
    command = [sys.executable, "-c", f"{code}; sys.exit(code if 'torch' not in sys.modules else 9)"]
    assert subprocess.run([*command, "run", "none.toml"], cwd=ROOT, timeout=60, capture_output=True).returncode == 2
