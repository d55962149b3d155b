#!/usr/bin/env bash
# Builds the wheel that has everything: sidecar, pd-proxy, the Python package.
#   wheel.sh DIRECTORY PYTHON
set -euo pipefail

out=$(mkdir -p "$1" && cd "$1" && pwd)
python=$2
root=$(cd "$(dirname "$0")/.." && pwd)
tools=$root/target/maturin
log=$root/target/wheel.log

mkdir -p "$root/target"
if ! [ -x "$tools/bin/maturin" ]; then
  if ! "$python" -m pip install --no-deps --disable-pip-version-check --progress-bar off --target "$tools" \
    maturin==1.16.0 >"$log" 2>&1; then
    tail -n 15 "$log" >&2
    echo "error: pip failed; its whole output is in $log" >&2
    exit 1
  fi
fi

cd "$root"
cargo build --release --locked --bin pd-proxy
scripts=$root/wheel/pd_sidecar.data/scripts
mkdir -p "$scripts" "$root/wheel/python/pd_sidecar"
trap 'rm -rf "$root/wheel/pd_sidecar.data" "$root/wheel/python"' EXIT
# Not in .gitignore, whose files no wheel takes.
cp "$root"/python/pd_sidecar/*.py "$root/python/pd_sidecar/py.typed" "$root/wheel/python/pd_sidecar"
install -m 755 "${CARGO_TARGET_DIR:-target}/release/pd-proxy" "$scripts/pd-proxy"
strip "$scripts/pd-proxy"
cd wheel
# `linux`: for this machine's own C library; a wheel for others needs a manylinux image.
"$tools/bin/maturin" build --release --locked --out "$out" --compatibility linux
