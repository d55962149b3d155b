#!/usr/bin/env bash
# Builds the wheel that contains everything: the sidecar, pd-proxy and the Python package.
#   wheel.sh DIRECTORY PYTHON [PROFILE]
# PROFILE is a profile of Cargo: `release` (default), or `dev`, which the tests have compiled already.
set -euo pipefail

out=$(mkdir -p "$1" && cd "$1" && pwd)
python=$2
profile=${3:-release}
cd "$(dirname "$0")/.."
log=target/wheel.log

cargo build --profile "$profile" --locked --bin sidecar --bin pd-proxy
# Cargo keeps the files of its profile `dev` in the folder `debug`.
built=${CARGO_TARGET_DIR:-target}/${profile/#dev/debug}
mkdir -p target/wheel
for program in sidecar pd-proxy; do
  strip -o "target/wheel/$program" "$built/$program"
done
if ! "$python" -m pip wheel --no-deps --disable-pip-version-check --progress-bar off --wheel-dir "$out" ./wheel \
  >"$log" 2>&1; then
  tail -n 15 "$log" >&2
  echo "error: pip failed; its whole output is in $log" >&2
  exit 1
fi
