#!/usr/bin/env bash
# Makes the virtual environment if it is not there and installs what is pinned, each file checked against its hash in
# requirements/*.lock. Safe to repeat; says what is missing.
# Usage: requirements/install.sh FOLDER [cpu|cuda]
set -euo pipefail

venv=${1:?usage: requirements/install.sh FOLDER [cpu|cuda]}
build=${2:-cpu}
cpu_index=https://download.pytorch.org/whl/cpu
cd "$(dirname "$0")/.."
torch=$(sed -n 's/^torch==//p' requirements/torch-cpu.txt)

fail() {
    echo "install: $*" >&2
    exit 1
}

fitting_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.11 python3.12 python3; do
        [ -n "$candidate" ] && command -v "$candidate" >/dev/null || continue
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    fail "got $(python3 --version 2>/dev/null || echo 'no python3'), expected Python 3.11 or 3.12: install python3.11, or give its path as PYTHON=..."
}

quiet_pip() {
    "$venv/bin/python" -m pip --quiet --quiet --disable-pip-version-check --no-input "$@"
}

installed_torch() {
    "$venv/bin/python" -c 'import importlib.metadata as m; print(m.version("torch"))' 2>/dev/null || true
}

# Nothing enters but files whose hashes the lists name: a build from source uses what is installed already.
install_locked() {
    quiet_pip install --require-hashes --no-deps --no-build-isolation "$@"
}

if [ ! -x "$venv/bin/pip" ]; then
    python=$(fitting_python)
    echo "install: making $venv with $("$python" --version)"
    "$python" -m venv "$venv" || fail "$python -m venv failed: on Debian and Ubuntu install python3-venv"
fi
command -v g++ >/dev/null || fail "got no C++ compiler, expected g++ (DeepSpeed compiles a small part of itself): install g++"

refused="pip installed nothing of this list, and says above why. Where a hash differs: run make lock if you changed that pin; \
if you did not, do not use that file"

# From the usual index where that has the build, else from PyTorch's own.
install_cpu_torch() {
    [ "$(installed_torch)" != "$torch" ] || return 0
    local said
    if ! said=$(install_locked -r requirements/torch-cpu.lock 2>&1) &&
        ! install_locked --index-url "$cpu_index" -r requirements/torch-cpu.lock; then
        echo "$said" >&2
        fail "got no CPU build of torch ${torch%+cpu} with a hash of requirements/torch-cpu.lock, neither from pip's usual index nor from $cpu_index: check the network, or install one into $venv by hand"
    fi
    [ "$(installed_torch)" = "$torch" ] || fail "got torch '$(installed_torch)', expected $torch: rm -r $venv and run again"
}

echo "install: pinned packages into $venv (some minutes the first time)"
install_locked -r requirements/build.lock || fail "$refused"
case $build in
cpu) install_cpu_torch ;;
cuda) ;; # its list has torch
*) fail "got $build, expected cpu or cuda" ;;
esac
install_locked -r "requirements/$build.lock" -r requirements/dev.lock || fail "$refused"
quiet_pip install --no-deps --no-build-isolation --editable .
echo "install: done"
