#!/usr/bin/env bash
# Writes the hashes beside the pins: requirements/NAME.lock from requirements/NAME.txt, as the package index gives them for
# every file of each pinned release. Run it (make lock) after a pin changes. install.sh installs from the locks.
set -euo pipefail
cd "$(dirname "$0")"

lock() {
    uv pip compile --quiet --no-deps --generate-hashes --no-annotate --no-header --python-version 3.11 "${@:2}" \
        "$1.txt" --output-file "$1.lock" >/dev/null
    echo "lock: requirements/$1.lock, $(grep -c == "$1.lock") pins"
}

for list in build cpu cuda dev; do
    lock "$list"
done
lock torch-cpu --index-url https://download.pytorch.org/whl/cpu
