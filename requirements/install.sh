#!/usr/bin/env bash
# Makes the virtual environment if it is not there and installs what is pinned. Safe to repeat; says what is missing.
# Usage: requirements/install.sh FOLDER [cpu|cuda]
set -euo pipefail

venv=${1:?usage: requirements/install.sh FOLDER [cpu|cuda]}
build=${2:-cpu}
torch=2.13.0
cpu_index=https://download.pytorch.org/whl/cpu
cd "$(dirname "$0")/.."

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

# What the plain pin would give, without downloading it: a CUDA build is a gigabyte of no use here.
plain_pin_gives() {
    quiet_pip install --dry-run --ignore-installed --no-deps --report - "torch==$torch" |
        "$venv/bin/python" -c 'import json, sys; print(json.load(sys.stdin)["install"][0]["metadata"]["version"])'
}

if [ ! -x "$venv/bin/pip" ]; then
    python=$(fitting_python)
    echo "install: making $venv with $("$python" --version)"
    "$python" -m venv "$venv" || fail "$python -m venv failed: on Debian and Ubuntu install python3-venv"
fi
command -v g++ >/dev/null || fail "got no C++ compiler, expected g++ (DeepSpeed compiles a small part of itself): install g++"

install_cpu_torch() {
    [ "$(installed_torch)" != "$torch+cpu" ] || return 0
    if [ "$(plain_pin_gives || true)" = "$torch+cpu" ]; then
        quiet_pip install --no-deps "torch==$torch"
    else
        quiet_pip install --no-deps --index-url "$cpu_index" "torch==$torch" ||
            fail "got no CPU build of torch $torch from $cpu_index: check the network, or install one into $venv by hand"
    fi
    [ "$(installed_torch)" = "$torch+cpu" ] || fail "got torch '$(installed_torch)', expected $torch+cpu: rm -r $venv and run again"
}

echo "install: pinned packages into $venv (some minutes the first time)"
case $build in
cpu) install_cpu_torch ;;
cuda) ;; # its list has torch
*) fail "got $build, expected cpu or cuda" ;;
esac
quiet_pip install --no-deps -r "requirements/$build.txt" -r requirements/dev.txt
quiet_pip install --no-deps --no-build-isolation --editable .
echo "install: done"
