#!/bin/sh
# clients.sh FOLDER VENV: installs the clients of tests/clients into FOLDER, with the packages of VENV.
set -eu
folder=$1
shared=$("$2/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
mkdir -p "$folder"
if [ ! -x "$folder/venv/bin/lm_eval" ]; then
    "$2/bin/python" -m venv "$folder/venv"
    inside=$("$folder/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
    echo "$shared" > "$inside/shared.pth"
    "$folder/venv/bin/pip" install -q litellm langchain-openai guidellm 'lm-eval[api]'
fi
if [ ! -d "$folder/node_modules/ai" ]; then
    (cd "$folder" && npm install --no-audit --no-fund openai ai @ai-sdk/openai @ai-sdk/openai-compatible)
fi
