#!/usr/bin/env bash
# Makes the environment in which the tests run real LMCache: a small environment on top of the engines' environment.
#   venv-lmcache.sh DIRECTORY ENGINES_ENVIRONMENT
# A stamp in the environment holds the hash of its requirements and the path and stamp of the engines' environment. If
# the stamp is unchanged, the script does nothing.
set -euo pipefail

venv=$1
base=$(cd "$2" && pwd)
root=$(cd "$(dirname "$0")/.." && pwd)
requirements=$root/scripts/requirements-lmcache.txt
stamp=$venv/.made-from
wanted="$(sha256sum <"$requirements" | cut -d' ' -f1) $base $(cat "$base/.made-from" 2>/dev/null)"

if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
  exit 0
fi

echo "LMCache's environment: $venv (once; 130 MB)"
rm -rf "$venv"
log=$root/target/venv-lmcache.log
mkdir -p "$root/target"
"$base/bin/python" -m venv --without-pip "$venv" >"$log" 2>&1
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
# Python finds the packages of the engines' environment after those of this one.
"$base/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$site/engines.pth"
if ! "$base/bin/python" -m pip install --no-deps --disable-pip-version-check --progress-bar off --target "$site" \
  -r "$requirements" >>"$log" 2>&1; then
  tail -n 15 "$log" >&2
  echo "error: pip failed; its whole output is in $log" >&2
  exit 1
fi

echo "$wanted" >"$stamp"
echo "LMCache's environment: done"
