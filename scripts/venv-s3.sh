#!/usr/bin/env bash
# Makes the environment with the S3 server of the tests.
#   venv-s3.sh DIRECTORY PYTHON
# A stamp in the environment holds the hash of its requirements. If the stamp is unchanged, the script does nothing.
set -euo pipefail

venv=$1
python=$2
root=$(cd "$(dirname "$0")/.." && pwd)
requirements=$root/scripts/requirements-s3.txt
stamp=$venv/.made-from
wanted=$(sha256sum <"$requirements" | cut -d' ' -f1)

if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
  exit 0
fi

echo "The S3 server's environment: $venv (once; 140 MB)"
rm -rf "$venv"
mkdir -p "$root/target"
log=$root/target/venv-s3.log
"$python" -m venv "$venv" >"$log" 2>&1
if ! "$venv/bin/python" -m pip install --no-deps --disable-pip-version-check --progress-bar off -r "$requirements" >>"$log" 2>&1; then
  tail -n 15 "$log" >&2
  echo "error: pip failed; its whole output is in $log" >&2
  exit 1
fi

echo "$wanted" >"$stamp"
echo "The S3 server's environment: done"
