"""What the files for clusters grant: a user without rights, a token that nobody else reads, addresses no wider than needed."""

import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

DEPLOY = Path(__file__).resolve().parent.parent / "deploy"
ROOT = DEPLOY.parent
USER = 10001


def pods():
    """Pod specs of the RayJob by what they are for."""
    job = yaml.safe_load((DEPLOY / "kuberay-rayjob.yaml").read_text())["spec"]
    cluster = job["rayClusterSpec"]
    workers = {f"worker {group['groupName']}": group["template"]["spec"] for group in cluster["workerGroupSpecs"]}
    return {
        "submitter": job["submitterPodTemplate"]["spec"],
        "head": cluster["headGroupSpec"]["template"]["spec"],
        **workers,
    }


@pytest.mark.parametrize("name", ["submitter", "head", "worker gpu"])
def test_a_pod_has_no_rights_beyond_the_restricted_standard(name):
    pod = pods()[name]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"] == {
        "runAsNonRoot": True,
        "runAsUser": USER,
        "runAsGroup": USER,
        "fsGroup": USER,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    for container in pod["containers"]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
    assert not pod.keys() & {"hostNetwork", "hostPID", "hostIPC"}
    assert not any("hostPath" in volume for volume in pod["volumes"])


@pytest.mark.parametrize("name", ["submitter", "head", "worker gpu"])
def test_what_a_pod_writes_lies_on_mounts(name):
    pod = pods()[name]
    mounts = {mount["mountPath"] for container in pod["containers"] for mount in container["volumeMounts"]}
    assert mounts >= {"/tmp", "/home/apportion"}
    if name != "submitter":
        assert mounts >= {"/shared", "/dev/shm"}
    used = {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]}
    assert used == {volume["name"] for volume in pod["volumes"]}


def test_the_cluster_asks_for_a_token_and_offers_no_port_that_a_run_has_no_use_for():
    job = yaml.safe_load((DEPLOY / "kuberay-rayjob.yaml").read_text())["spec"]["rayClusterSpec"]
    assert job["authOptions"] == {"mode": "token"}
    ports = pods()["head"]["containers"][0]["ports"]
    assert {port["containerPort"] for port in ports} == {6379, 8265}


def test_the_image_runs_as_a_user_to_whom_the_program_does_not_belong():
    text = (DEPLOY / "Dockerfile").read_text()
    steps = [line for line in re.sub(r"\\\n\s*", "", text).splitlines() if line and not line.startswith("#")]
    assert steps[-1] == f"USER {USER}:{USER}"
    assert f"useradd --uid {USER} --gid {USER}" in text
    assert "ENV HOME=/home/apportion" in steps
    copies = [step for step in steps if step.startswith(("COPY", "ADD"))]
    assert copies and not any("--chown" in step for step in copies)
    assert [step for step in steps if "chown" in step or " -o " in step] == [
        f"RUN .venv/bin/python -m compileall -q apportion benchmarks && install -d -o {USER} -g {USER} -m 0750 runs"
    ]
    assert any("PIP_NO_CACHE_DIR=1" in step and "make .venv/.installed" in step for step in steps)
    copied = {word for step in copies for word in step.split()[1:-1]}
    taken = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied == taken and all((ROOT / name).exists() for name in taken)


def test_ray_up_shows_the_dashboard_on_one_address_and_the_token_to_nobody():
    cluster = yaml.safe_load((DEPLOY / "ray-cluster.yaml").read_text())
    start = cluster["head_start_ray_commands"][-1]
    head = cluster["provider"]["head_ip"]
    assert f"--dashboard-host={head}" in start and f"--node-ip-address={head}" in start
    assert "0.0.0.0" not in start
    for command in (start, cluster["worker_start_ray_commands"][-1]):
        assert command.startswith("RAY_AUTH_MODE=token ")
    assert cluster["setup_commands"][0] == "chmod 700 ~/.ray && chmod 600 ~/.ray/auth_token"


def test_slurm_gives_each_job_a_token_that_its_user_alone_reads(tmp_path):
    script = (DEPLOY / "slurm.sh").read_text()
    begin, end = script.index("# A token of this job"), script.index("head=$(")
    part = "set -euo pipefail\numask 000\n" + script[begin:end].replace("trap ", ": trap ")
    shown = part + 'echo "$RAY_AUTH_MODE $RAY_AUTH_TOKEN_PATH"'
    done = subprocess.run(
        ["bash", "-c", shown], capture_output=True, text=True, check=True,
        env={"HOME": str(tmp_path), "SLURM_JOB_ID": "7", "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"},
    )  # fmt: skip
    mode, _, path = done.stdout.strip().partition(" ")
    assert (mode, Path(path).parent) == ("token", tmp_path)
    assert stat.S_IMODE(Path(path).stat().st_mode) == 0o600
    assert re.fullmatch(r"[0-9a-f]{64}", Path(path).read_text())
    assert "\numask 027\n" in script
    assert "trap 'rm -f \"$RAY_AUTH_TOKEN_PATH\"' EXIT" in script
