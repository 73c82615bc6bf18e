"""The files of examples/cluster: shell and YAML parse, their commands are real, and they agree with themselves."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.docs.pages import ROOT, Block, check_commands

CLUSTER = ROOT / "examples" / "cluster"


def commands(file: Path, text: str) -> int:
    """Parse the dimefm commands in `text` as the real commands do; how many there are."""
    return check_commands(Block(file, 1, "sh", "parsed", text))


@pytest.mark.parametrize("name", ["stage1", "train"])
def test_a_batch_script_is_a_shell_script_and_shows_a_real_command(name: str) -> None:
    script = CLUSTER / f"{name}.sbatch"
    subprocess.run(["bash", "-n", str(script)], check=True)
    head = [line.removeprefix("#") for line in script.read_text().split("#SBATCH")[0].splitlines() if line[:1] == "#"]
    shown = "\n".join(head).replace("\\\n", " ")
    command = "dimefm train-student" if name == "train" else "dimefm"
    assert commands(script, re.sub(r".*?\.sbatch", command, re.findall(r"sbatch --.*", shown)[0])) == 1


def containers(document: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Each pod's specification in a document, with its only container."""
    if document["kind"] == "Job":
        pods = [document["spec"]["template"]]
    else:
        cluster = document["spec"]["rayClusterSpec"]
        pods = [group["template"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]
    return [(pod["spec"], *pod["spec"]["containers"]) for pod in pods]


def test_the_ray_job_uses_the_ray_that_is_pinned_and_a_worker_per_gpu() -> None:
    file = CLUSTER / "kuberay-stage1.yaml"
    job = yaml.safe_load(file.read_text())
    assert commands(file, job["spec"]["entrypoint"]) == 1
    pinned = re.search(r"^ray==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == pinned[1]
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    gpus = int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
    assert f"--workers {group['replicas'] * gpus} " in job["spec"]["entrypoint"]
    _require_whole(job)


def test_the_training_job_has_a_pod_per_node_and_a_process_per_gpu() -> None:
    file = CLUSTER / "kubernetes-train.yaml"
    service, job = yaml.safe_load_all(file.read_text())
    ((spec, container),) = containers(job)
    words = container["command"]
    assert commands(file, shlex.join(words).replace("=", " ")) == 1
    assert f"--nnodes={job['spec']['completions']}" in words
    assert f"--nproc-per-node={container['resources']['limits']['nvidia.com/gpu']}" in words
    assert job["spec"]["parallelism"] == job["spec"]["completions"]
    name = job["metadata"]["name"]
    assert any(word.startswith(f"--rdzv-endpoint={name}-0.{spec['subdomain']}:") for word in words)
    assert (service["metadata"]["name"], service["spec"]["selector"]) == (spec["subdomain"], {"job-name": name})
    _require_whole(job)


def _require_whole(document: dict[str, Any]) -> None:
    """Every volume that is mounted exists, and what is asked for is what is granted."""
    for spec, container in containers(document):
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in spec["volumes"]}
        assert container["resources"]["requests"] == container["resources"]["limits"]
