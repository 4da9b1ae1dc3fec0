"""Where Ray's files go, and one line for each way in which it does not start."""

import errno
import os
import re
import stat

import pytest

from apportion.platform import start
from apportion.platform.errors import ConfigError


def test_rays_session_goes_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setattr(start, "LONGEST_FOLDER", 300)
    assert start.session_folder({"TMPDIR": str(tmp_path)}) == tmp_path / "ray"
    new = tmp_path / "not" / "there"
    assert start.session_folder({"TMPDIR": "/sys", "RAY_TMPDIR": str(new)}) == new / "ray" and new.is_dir()


def test_a_folder_that_is_too_long_for_sockets_is_replaced_or_refused(tmp_path, monkeypatch):
    assert start.LONGEST_FOLDER == 39
    fits, long = tmp_path / "x", tmp_path / ("x" * 60)
    monkeypatch.setattr(start, "LONGEST_FOLDER", len(str(fits)))
    monkeypatch.setattr(start, "SHORT_FOLDERS", ("/proc/none", str(fits)))
    assert start.session_folder({"TMPDIR": str(fits)}) == fits / "ray"
    assert start.session_folder({"TMPDIR": str(long)}) == fits / "ray"
    with pytest.raises(
        ConfigError, match=r"^RAY_TMPDIR: got .* bytes, which is too long for Unix sockets, expected at most"
    ):
        start.session_folder({"RAY_TMPDIR": str(long)})
    monkeypatch.setattr(start, "SHORT_FOLDERS", ("/proc/none",))
    with pytest.raises(ConfigError, match=r"^TMPDIR: got .* set RAY_TMPDIR=/tmp, or TMPDIR=/tmp$"):
        start.session_folder({"TMPDIR": str(long)})


def test_a_temporary_folder_that_takes_no_files_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"^TMPDIR: got /proc/none, where no file can be written \("):
        start.session_folder({"TMPDIR": "/proc/none"})
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"^RAY_TMPDIR: got .*/file, where no file can be written \("):
        start.session_folder({"RAY_TMPDIR": str(tmp_path / "file")})
    monkeypatch.setattr(start, "SMALLEST_SPACE", 2**60)
    with pytest.raises(ConfigError, match=r"^TMPDIR: got .*, which has \d+ MiB free of at least \d+, expected"):
        start.session_folder({"TMPDIR": str(tmp_path)})


def test_a_home_folder_that_keeps_no_token_is_made_up_for(tmp_path):
    for given in ({"HOME": str(tmp_path)}, {"HOME": "/proc/none", "RAY_AUTH_MODE": "disabled"}):
        environment = dict(given)
        start.provide_token(environment)
        assert environment == given
    environment = {"HOME": "/proc/none"}
    start.provide_token(environment)
    token = environment["RAY_AUTH_TOKEN"]
    start.provide_token(environment)
    assert len(token) == 64 and environment["RAY_AUTH_TOKEN"] == token


def test_the_token_is_readable_by_its_owner_alone(tmp_path, capsys):
    home = tmp_path / "new" / "home"
    before = os.umask(0)
    try:
        start.provide_token({"HOME": str(home)})
    finally:
        os.umask(before)
    file = home / ".ray" / "auth_token"
    assert [path.name for path in file.parent.iterdir()] == ["auth_token"]
    assert (stat.S_IMODE(file.stat().st_mode), stat.S_IMODE(file.parent.stat().st_mode)) == (0o600, 0o700)
    token = file.read_text()
    assert re.fullmatch("[0-9a-f]{64}", token)
    start.provide_token({"HOME": str(home)})
    assert file.read_text() == token and capsys.readouterr().err == ""


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o666])
def test_a_token_that_others_can_read_is_taken_from_them(mode, tmp_path, capsys):
    file = tmp_path / ".ray" / "auth_token"
    file.parent.mkdir()
    file.write_text("t" * 64)
    file.chmod(mode)
    for _ in range(2):
        start.provide_token({"HOME": str(tmp_path)})
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and file.read_text() == "t" * 64
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "t" * 64 not in said
    assert said.startswith(f"warning: other users could read {file}, Ray's token: its mode is 0600 now")


def test_a_token_that_another_run_writes_first_is_kept(tmp_path, monkeypatch):
    file = tmp_path / ".ray" / "auth_token"
    link = os.link

    def late(source, target):
        file.write_text("theirs")
        link(source, target)

    monkeypatch.setattr(os, "link", late)
    environment = {"HOME": str(tmp_path)}
    start.provide_token(environment)
    assert file.read_text() == "theirs" and environment == {"HOME": str(tmp_path)}
    assert [path.name for path in file.parent.iterdir()] == ["auth_token"]


def test_workers_are_told_of_no_folder_before_what_is_installed():
    job = start.job_config("mine")
    job._py_driver_sys_path.extend(["/script", "/working"])
    assert job._py_driver_sys_path == [] and job.ray_namespace == "mine"
    assert start.worker_variables()["PYTHONSAFEPATH"] == "1"


class AuthenticationError(Exception):
    pass


SOCKET = "validate_socket_filename failed: AF_UNIX path length cannot exceed 107 bytes: /long/ray/session/sockets/plasma_store"
STORE = (
    "The configured object store size (20.0 GB) exceeds /dev/shm size (0.06 GB). This will harm performance. Consider "
    "deleting files in /dev/shm or increasing its\nsize with --shm-size in Docker."
)
VERSIONS = (
    "Version mismatch: The cluster was started with:\n    Ray: 2.9.0\n    Python: 3.10.1\nThis process on node 10.0.0.1 was "
    "started with:\n    Ray: 2.60.0\n    Python: 3.11.7\n"
)
TOKEN = "Token authentication is enabled but no authentication token was found"
CASES = [
    (OSError(SOCKET), None, "TMPDIR: got /t/ray, which is too long for Unix sockets, expected at most 39 bytes: set RAY_TMPDIR=/tmp"),
    (PermissionError(errno.EACCES, "Permission denied", "/home/x/.ray"), None, "/home/x/.ray: got Permission denied, expected a folder that Ray can write: set HOME"),
    (OSError(errno.EROFS, "Read-only file system", "/t/ray"), None, "/t/ray: got Read-only file system, expected"),
    (OSError(errno.ENOSPC, "No space left on device"), None, "Ray did not start on this machine: no space left at /t/ray: free some"),
    (OSError(errno.EMFILE, "Too many open files"), None, "Ray did not start on this machine: too many open files, expected more: ulimit -n 65536"),
    (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), None, "Ray did not start on this machine: no process or memory left"),
    (OSError(errno.EADDRINUSE, "Address already in use"), None, "Ray did not start on this machine: [Errno 98] Address already in use; end the process that has the port"),
    (ValueError(STORE), None, "/dev/shm: got too little room for Ray's object store (The configured object store size (20.0 GB)"),
    (AuthenticationError(TOKEN), None, f"RAY_AUTH_MODE: got no valid token ({TOKEN}), expected the cluster's token in RAY_AUTH_TOKEN"),
    (Exception("The current node timed out during startup."), None, "Ray did not start on this machine: The current node timed out during startup. Its logs are under /t/ray/session_latest/logs"),
    (ConnectionError("Failed to connect to Ray cluster at head:1"), "head:1", "cluster.address: cannot reach head:1: Failed to connect to Ray cluster at head:1; start it (ray start --head), or unset RAY_ADDRESS"),
    (ValueError("Unable to parse port number from abc"), "h:abc", "cluster.address: cannot reach h:abc: Unable to parse port number from abc"),
    (RuntimeError(VERSIONS), "head:1", "cluster.address: cannot reach head:1: Version mismatch: The cluster was started with: Ray: 2.9.0 Python: 3.10.1 This process on node 10.0.0.1 was started with: Ray: 2.60.0 Python: 3.11.7; install the same versions"),
    (AuthenticationError(TOKEN), "head:1", f"cluster.address: cannot reach head:1: {TOKEN}; set the cluster's token in RAY_AUTH_TOKEN"),
]  # fmt: skip


@pytest.mark.parametrize(("error", "address", "line"), CASES, ids=[line[:60] for _, _, line in CASES])
def test_each_failure_of_rays_start_has_a_line_of_its_own(error, address, line, tmp_path):
    said = str(start.explained(error, address, start.Path("/t/ray")))
    assert said.startswith(line) and "\n" not in said
