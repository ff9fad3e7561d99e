"""deploy/slurm/isthmus.sbatch under a real Slurm: munged, slurmctld and slurmd on this machine, started by the test.

Run with `make test-slurm`, as root, where Debian's `slurm-wlm` and `munge` (or their like) are installed.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
from helpers import ROOT
from helpers.deployed import DEPLOY, variables
from helpers.isthmus_runs import records, under_way

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "srun", "sacct")
SYSTEM = "/usr/sbin:/usr/bin:/sbin:/bin"
MISSING = [name for name in PROGRAMS[:-1] if shutil.which(name, path=f"{os.environ['PATH']}:{SYSTEM}") is None]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.slurm,
    pytest.mark.timeout(300),
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (apt-get install slurm-wlm munge)"),
    pytest.mark.skipif(os.geteuid() != 0, reason="slurmd needs root"),
]

CONFIG = """\
ClusterName=isthmus
SlurmctldHost={host}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
SlurmctldPort={controller}
SlurmdPort={daemon}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture
def slurm(tmp_path: Path, cache: Path) -> Iterator[dict[str, str]]:
    """The environment for commands of a Slurm whose only machine is this one, idle."""
    folder = Path("/run") / f"isthmus-slurm-{os.getpid()}"  # munge wants a folder whose parents only root can write to
    folder.mkdir(mode=0o755)
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        controller, daemon = (each.getsockname()[1] for each in (one, two))
    host = socket.gethostname().partition(".")[0]
    text = CONFIG.format(host=host, folder=folder, controller=controller, daemon=daemon, cores=os.cpu_count())
    (folder / "slurm.conf").write_text(text)
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    conf = str(folder / "slurm.conf")
    surroundings = variables(tmp_path, cache) | {"SLURM_CONF": conf}
    surroundings["PATH"] += f":{SYSTEM}"
    munge = [f"--{name}={folder}/munge.{end}" for name, end in NAMES.items()]
    try:
        with ExitStack() as stack:
            for words in (
                ["munged", "--foreground", *munge],
                ["slurmctld", "-D", "-c"],
                ["slurmd", "-D", "-N", host],
            ):
                stack.enter_context(under_way(words, ROOT, surroundings, folder / f"{words[0]}.out"))
                time.sleep(0.5)
            await_idle(surroundings, host, folder)
            yield surroundings
    finally:
        for process in psutil.process_iter(["name", "environ"]):  # slurmd lets its slurmstepd go
            if process.info["name"] == "slurmstepd" and (process.info["environ"] or {}).get("SLURM_CONF") == conf:
                process.kill()
        shutil.rmtree(folder)


NAMES = {"key-file": "key", "socket": "socket", "log-file": "log", "pid-file": "pid", "seed-file": "seed"}


def await_idle(surroundings: dict[str, str], host: str, folder: Path) -> None:
    deadline = time.monotonic() + 60
    while True:
        done = subprocess.run(
            ["scontrol", "show", "node", host], env=surroundings, capture_output=True, text=True, timeout=30
        )
        if re.search(r"State=IDLE(\s|$)", done.stdout):
            return
        logs = "".join(path.read_text() for path in sorted(folder.glob("*.log")))
        assert time.monotonic() < deadline, done.stdout + done.stderr + logs
        time.sleep(0.5)


def test_the_script_trains_under_slurm(slurm: dict[str, str], tmp_path: Path) -> None:
    log = tmp_path / "job.log"
    tasks = ["--nodes=1", "--ntasks-per-node=2", "--cpus-per-task=1", f"--output={log}", "--wait", f"--chdir={ROOT}"]
    script = str(DEPLOY / "slurm" / "isthmus.sbatch")
    words = ["sbatch", *tasks, script, "configs/tiny.toml", "--net.profile", "unshaped", "--interface", "127.0.0.1"]
    done = subprocess.run(words, cwd=ROOT, env=slurm, capture_output=True, text=True, timeout=200)
    said = log.read_text() if log.exists() else ""
    assert done.returncode == 0, done.stdout + done.stderr + said
    (job,) = re.findall(r"Submitted batch job (\d+)", done.stdout)
    assert f"run slurm-{job}: done after 4 steps" in said
    assert "2 of the nodes run on these cores" in said or "1 of the nodes run on these cores" in said
    assert len(records(tmp_path / "outputs" / f"slurm-{job}")) == 4
