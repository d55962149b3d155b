#!/usr/bin/env bash
# Makes a virtual environment with the routers that tests run, and with which the benchmark compares pd-proxy.
#   routers.sh DIRECTORY
# A stamp in the environment holds the hash of its requirements. If the hash is unchanged, the script does nothing.
set -euo pipefail

venv=$1
root=$(cd "$(dirname "$0")/.." && pwd)
requirements=$root/scripts/requirements-routers.txt
wanted=$(sha256sum <"$requirements" | cut -d' ' -f1)

if [ "$(cat "$venv/.made-from" 2>/dev/null)" = "$wanted" ]; then
  exit 0
fi

python3 -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$requirements"
echo "$wanted" >"$venv/.made-from"
