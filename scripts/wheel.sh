#!/usr/bin/env bash
# Builds the wheel that contains everything: the sidecar, pd-proxy, pd-store, the Python package, manual pages,
# completions for shells, and the list of all crates with their licences.
#   wheel.sh DIRECTORY PYTHON [PROGRAMS]
# PROGRAMS is a folder with programs that are built already. Without it, the script makes the build of the profile `dist`.
set -euo pipefail

out=$(mkdir -p "$1" && cd "$1" && pwd)
python=$2
programs=${3:+$(cd "$3" && pwd)}
cd "$(dirname "$0")/.."
log=target/wheel.log

if [ -z "$programs" ]; then
  cargo build --profile dist --locked --bin sidecar --bin pd-proxy --bin pd-store
  programs=${CARGO_TARGET_DIR:-target}/dist
fi
# Files of an earlier build must not get into the wheel.
rm -rf target/wheel
mkdir -p target/wheel/{bash,zsh,fish}
for program in sidecar pd-proxy pd-store; do
  strip -o "target/wheel/$program" "$programs/$program"
  "$programs/$program" manual target/wheel/man
  "$programs/$program" completions bash >"target/wheel/bash/$program"
  "$programs/$program" completions zsh >"target/wheel/zsh/_$program"
  "$programs/$program" completions fish >"target/wheel/fish/$program.fish"
done
"$python" scripts/sbom.py target/wheel
if ! "$python" -m pip wheel --no-deps --disable-pip-version-check --progress-bar off --wheel-dir "$out" ./wheel \
  >"$log" 2>&1; then
  tail -n 15 "$log" >&2
  echo "error: pip failed; its whole output is in $log" >&2
  exit 1
fi
