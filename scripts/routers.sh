#!/usr/bin/env bash
# Makes a virtual environment with the routers that pd-proxy is measured against.
#   routers.sh DIRECTORY
# A stamp in it names the requirements it was made from: with the same ones, nothing is done again.
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
