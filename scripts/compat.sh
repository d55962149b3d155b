#!/bin/sh
# compat.sh FOLDER VENV VERSION...: fetches the Python tree of these versions of vLLM into FOLDER/VERSION, from vLLM's
# source distributions on PyPI.
set -eu
folder=$1
venv=$2
shift 2
mkdir -p "$folder"
if [ ! -e "$folder/venv/ready" ]; then
    "$venv/bin/python" -m venv "$folder/venv"
    # pip builds the metadata of a source distribution, and for this vLLM needs its build tools.
    "$folder/venv/bin/pip" install -q 'setuptools>=77' setuptools-scm setuptools-rust wheel packaging jinja2
    shared=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
    inside=$("$folder/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
    echo "$shared" > "$inside/shared.pth"
    touch "$folder/venv/ready"
fi
for version in "$@"; do
    [ -d "$folder/$version/vllm" ] && continue
    VLLM_VERSION_OVERRIDE=$version VLLM_TARGET_DEVICE=empty "$folder/venv/bin/pip" download -q "vllm==$version" \
        --no-deps --no-binary vllm --no-build-isolation -d "$folder"
    rm -rf "$folder/unpacked"
    mkdir "$folder/unpacked"
    tar xzf "$folder/vllm-$version.tar.gz" -C "$folder/unpacked" --strip-components=1 "vllm-$version/vllm"
    rm "$folder/vllm-$version.tar.gz"
    mv "$folder/unpacked" "$folder/$version"
done
