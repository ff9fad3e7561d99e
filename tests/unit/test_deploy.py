"""The files under deploy/: by the schemas of Kubernetes, and by giving their commands to our own command line.

That the commands then train is an end-to-end test (tests/e2e/test_launch.py).
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from helpers import ROOT

from node.commands.launch import Spot, settings_of, spot_of
from node.config import Config, load_config
from node.options import parse

DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
VERSION = "1.31"
RUN = "/isthmus/run/run.toml"


def load(path: Path) -> dict[str, Any]:
    document = yaml.safe_load(path.read_text())
    assert isinstance(document, dict)
    return document


JOB = load(KUBERNETES / "job.yaml")
JOBSET = load(DEPLOY / "jobset" / "jobset.yaml")
SKYPILOT = load(DEPLOY / "skypilot" / "isthmus.yaml")
JOBS = {
    "kubernetes": JOB,
    "jobset": {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "isthmus-nodes-0"},
        "spec": JOBSET["spec"]["replicatedJobs"][0]["template"]["spec"],
    },
}
_LEVEL = {"type": "object", "additionalProperties": False}
JOBSET_SCHEMA = _LEVEL | {
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": "jobset.x-k8s.io/v1alpha2"},
        "kind": {"const": "JobSet"},
        "metadata": {"type": "object", "required": ["name"]},
        "spec": _LEVEL
        | {
            "required": ["replicatedJobs"],
            "properties": {
                "network": _LEVEL
                | {
                    "properties": {
                        "enableDNSHostnames": {"type": "boolean"},
                        "publishNotReadyAddresses": {"type": "boolean"},
                        "subdomain": {"type": "string"},
                    }
                },
                "failurePolicy": _LEVEL | {"properties": {"maxRestarts": {"type": "integer", "minimum": 0}}},
                "replicatedJobs": {
                    "type": "array",
                    "items": _LEVEL
                    | {
                        "required": ["name", "template"],
                        "properties": {
                            "name": {"type": "string", "pattern": "^[a-z][a-z0-9-]*$"},
                            "replicas": {"type": "integer", "minimum": 1},
                            "template": _LEVEL | {"properties": {"spec": {"type": "object"}}},
                        },
                    },
                },
            },
        },
    },
}
"""The part of JobSet's own schema (v1alpha2) that deploy/jobset uses, with nothing else allowed. The Job in it is
checked by Kubernetes' schema."""


def container(job: dict[str, Any]) -> dict[str, Any]:
    (found,) = job["spec"]["template"]["spec"]["containers"]
    assert isinstance(found, dict)
    return found


def environment(job: dict[str, Any], index: int) -> dict[str, str]:
    """The variables that Kubernetes gives the pod of this index."""
    given = {entry["name"]: entry.get("value", "from a secret") for entry in container(job)["env"]}
    return given | {"JOB_COMPLETION_INDEX": str(index)}


def config_of(words: list[str], spot: Spot) -> Config:
    """The config that a process of the launcher would have."""
    options, settings = parse(words)
    assert options.command == "launch"
    path = KUBERNETES / "run.toml" if str(options.config) == RUN else ROOT / options.config
    before = load_config(path, settings)
    return load_config(path, [*settings, *settings_of(spot, before)])


@pytest.mark.parametrize("path", sorted(KUBERNETES.glob("*.yaml")), ids=lambda path: path.name)
def test_the_files_are_what_kubernetes_expects(path: Path) -> None:
    if path.name != "kustomization.yaml":
        kubernetes_validate.validate(load(path), VERSION, strict=True)


@pytest.mark.parametrize("name", JOBS)
def test_the_jobs_are_what_kubernetes_expects(name: str) -> None:
    kubernetes_validate.validate(JOBS[name], VERSION, strict=True)
    misspelt = yaml.safe_load(yaml.safe_dump(JOBS[name]).replace("restartPolicy", "restartPolicies"))
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(misspelt, VERSION, strict=True)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="there is no kubectl here")
@pytest.mark.parametrize("folder", ["kubernetes", "kubernetes-gpu"])
def test_kustomize_puts_the_files_together(folder: str) -> None:
    done = subprocess.run(["kubectl", "kustomize", DEPLOY / folder], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    documents = list(yaml.safe_load_all(done.stdout))
    for document in documents:
        kubernetes_validate.validate(document, VERSION, strict=True)
    found = {document["kind"]: document for document in documents}
    assert found["ConfigMap"]["data"]["run.toml"] == (KUBERNETES / "run.toml").read_text()
    job = found["Job"]
    volumes = {volume["name"]: volume for volume in job["spec"]["template"]["spec"]["volumes"]}
    assert volumes["run"]["configMap"]["name"] == found["ConfigMap"]["metadata"]["name"]
    gpu = folder == "kubernetes-gpu"
    assert container(job)["image"] == f"registry.example.org/isthmus{'-cuda' if gpu else ''}:latest"
    assert ("nvidia.com/gpu" in container(job)["resources"]["limits"]) is gpu
    assert config_of(container(job)["args"], Spot(0, 4, "a", None)).run.device == ("cuda" if gpu else "cpu")


def test_the_jobset_is_what_its_controller_expects() -> None:
    jsonschema.validate(JOBSET, JOBSET_SCHEMA)


@pytest.mark.parametrize("name", JOBS)
def test_pods_become_ranks_of_one_run(name: str) -> None:
    spec = JOBS[name]["spec"]
    assert (spec["completionMode"], spec["maxFailedIndexes"]) == ("Indexed", 0)
    assert spec["completions"] == spec["parallelism"]
    spots = [spot_of(environment(JOBS[name], index)) for index in range(spec["completions"])]
    assert [spot.rank for spot in spots] == [0, 1, 2, 3]
    assert {spot.world for spot in spots} == {spec["completions"]}
    configs = [config_of(container(JOBS[name])["args"], spot) for spot in spots]
    assert {config.digest() for config in configs} == {configs[0].digest()}
    assert configs[0].coordinator.nodes == 4
    assert configs[0].run.outputs == "/isthmus/outputs"
    assert configs[0].net.profile == "unshaped"
    assert configs[0].coordinator.join_timeout_s == 1800


def test_the_master_is_the_name_that_pod_0_gets() -> None:
    service = load(KUBERNETES / "service.yaml")
    name, subdomain = spot_of(environment(JOB, 0)).master.split(".")
    assert name == f"{JOB['metadata']['name']}-0"  # an Indexed Job names its pods so
    assert subdomain == JOB["spec"]["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"].items() <= JOB["spec"]["template"]["metadata"]["labels"].items()
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"]

    name, subdomain = spot_of(environment(JOBS["jobset"], 0)).master.split(".")
    assert subdomain == JOBSET["metadata"]["name"]  # JobSet's service is called so
    assert name == f"{subdomain}-{JOBSET['spec']['replicatedJobs'][0]['name']}-0-0"


@pytest.mark.parametrize("name", JOBS)
def test_mounts_have_volumes_and_lie_where_the_image_made_room(name: str) -> None:
    pod = JOBS[name]["spec"]["template"]["spec"]
    assert {mount["name"] for mount in container(JOBS[name])["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]
    }
    mounts = {mount["mountPath"] for mount in container(JOBS[name])["volumeMounts"]}
    assert {"/isthmus/outputs", "/isthmus/cache", RUN.rpartition("/")[0]} == mounts
    claim = load(KUBERNETES / "storage.yaml")["metadata"]["name"]
    assert {"persistentVolumeClaim": {"claimName": claim}, "name": "outputs"} in pod["volumes"]
    assert pod["securityContext"]["runAsUser"] == 1000  # that of the image


def test_both_jobs_are_the_same_pods() -> None:
    one, other = (container(job) for job in JOBS.values())
    assert one["args"] == other["args"]
    assert one["volumeMounts"] == other["volumeMounts"]


def test_skypilots_commands_are_ours() -> None:
    assert SKYPILOT["secrets"] == {"ISTHMUS_TOKEN": None}
    script = SKYPILOT["run"].replace("\\\n", " ")
    (line,) = (line for line in script.splitlines() if "isthmus launch" in line)
    for name, value in SKYPILOT["envs"].items():
        line = line.replace(f'"${name}"', shlex.quote(value))
    words = shlex.split(line.partition(" isthmus ")[2])
    config = config_of(words, Spot(1, 4, "10.0.0.5", 1))
    assert (config.net.profile, config.run.device, config.coordinator.nodes) == ("unshaped", "cuda:1", 4)
    for part in ("setup", "run"):
        assert subprocess.run(["sh", "-n"], input=SKYPILOT[part], text=True, timeout=10).returncode == 0


def test_the_script_for_slurm_is_one() -> None:
    assert subprocess.run(["bash", "-n", DEPLOY / "slurm" / "isthmus.sbatch"], timeout=10).returncode == 0


def test_the_page_names_every_folder_and_every_file_says_how_to_start_it() -> None:
    page = (DEPLOY / "README.md").read_text()
    for folder in (path for path in DEPLOY.iterdir() if path.is_dir()):
        assert f"({folder.name}/" in page, folder.name
    for path, command in (
        ("kubernetes/kustomization.yaml", "kubectl apply -k deploy/kubernetes"),
        ("kubernetes-gpu/kustomization.yaml", "kubectl apply -k deploy/kubernetes-gpu"),
        ("jobset/jobset.yaml", "-f deploy/jobset/jobset.yaml"),
        ("slurm/isthmus.sbatch", "sbatch deploy/slurm/isthmus.sbatch"),
        ("skypilot/isthmus.yaml", "sky launch -c isthmus deploy/skypilot/isthmus.yaml"),
    ):
        assert command in (DEPLOY / path).read_text()
