"""Runs real clients against one plain vLLM and through the proxy, and compares what they print.

    python tests/clients/run.py FOLDER [NAME ...]

FOLDER has the clients; `scripts/clients.sh` installs them. The program writes a table to `target/clients.md`. The exit
code is 1 if a client fails through the proxy, gets another answer there, or moves no KV.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent)]

from harness.both import Both, both
from harness.sidecar import ROOT

OUT = ROOT / "target" / "clients.md"
BOUND_S = 240

# The program behind `vllm bench serve`; its console script needs a distribution with the name `vllm`.
BENCH = """
import argparse
from vllm.benchmarks import serve
parser = argparse.ArgumentParser()
serve.add_cli_args(parser)
serve.main(parser.parse_args())
"""

TASK = """
task: small
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n\\n"], max_gen_toks: 8, temperature: 0}}
metric_list: [{{metric: exact_match}}]
"""


@dataclass(frozen=True)
class Client:
    """One client. `prints` is true if the client prints its answers; other clients only have to succeed."""

    name: str
    command: list[str]
    prints: bool


@dataclass(frozen=True)
class Result:
    """The result of one run: the exit code, the output, and the end of the errors."""

    code: int
    out: str
    errors: str


def main(folder: Path, wanted: list[str]) -> int:
    rows, failed = [], False
    flags = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes")
    with both(flags) as servers, tempfile.TemporaryDirectory() as scratch:
        for client in _clients(folder, servers, Path(scratch)):
            if wanted and client.name not in wanted:
                continue
            plain = _run(client, servers.plain.url)
            servers.pair.reset_prefix_caches()
            before = servers.pair.proxy.metrics()
            ours = _run(client, servers.pair.proxy.url)
            after = servers.pair.proxy.metrics()
            moved = int(after.sum("pd_proxy_transfers") - before.sum("pd_proxy_transfers"))
            same = not client.prints or plain.out == ours.out
            good = ours.code == 0 and same and moved > 0
            failed |= not good and plain.code == 0
            rows.append(f"| {client.name} | {_word(plain)} | {_word(ours)} | {'yes' if same else 'no'} | {moved} |")
            if not good:
                sys.stderr.write(f"{client.name}\nplain {plain}\nproxy {ours}\n")
    head = ["| client | plain | through the proxy | same answers | requests with moved KV |", "|---|---|---|---|---|"]
    text = "\n".join([*head, *rows]) + "\n"
    OUT.write_text(text)
    sys.stdout.write(text)
    return 1 if failed else 0


def _clients(folder: Path, servers: Both, scratch: Path) -> list[Client]:
    """Returns the clients. `URL` in a command stands for the server."""
    python, model = str(folder / "venv" / "bin" / "python"), str(servers.model)
    data = scratch / "data.json"
    lines = [{"question": f"read file {at} and", "answer": "x"} for at in range(8)]
    data.write_text("\n".join(json.dumps(line) for line in lines))
    (scratch / "small.yaml").write_text(TASK.format(data=data))
    # node finds packages beside the program only.
    for program in HERE.glob("*.mjs"):
        (folder / program.name).write_text(program.read_text())
    return [
        Client("openai (Python)", [python, str(HERE / "openai_client.py"), "URL"], True),
        Client("litellm", [python, str(HERE / "litellm_client.py"), "URL"], True),
        Client("langchain-openai", [python, str(HERE / "langchain_client.py"), "URL"], True),
        Client("openai (npm)", ["node", str(folder / "openai_npm.mjs"), "URL"], True),
        Client("ai (npm)", ["node", str(folder / "ai_sdk.mjs"), "URL"], True),
        Client("vllm bench serve", [
            sys.executable, "-c", BENCH, "--backend", "openai-chat", "--endpoint", "/v1/chat/completions",
            "--base-url", "URL", "--model", "m", "--tokenizer", model, "--dataset-name", "random",
            "--random-input-len", "200", "--random-output-len", "8", "--num-prompts", "16", "--disable-tqdm",
        ], False),
        Client("guidellm", [
            str(folder / "venv" / "bin" / "guidellm"), "benchmark", "--target", "URL", "--model", "m",
            "--processor", model, "--data", '{"prompt_tokens": 100, "output_tokens": 8}', "--rate-type", "concurrent",
            "--rate", "4", "--max-requests", "16", "--output-path", str(scratch / "guidellm.json"),
        ], False),
        Client("lm-eval, local-completions", [
            str(folder / "venv" / "bin" / "lm_eval"), "--model", "local-completions", "--tasks", "small",
            "--include_path", str(scratch), "--model_args",
            f"base_url=URL/v1/completions,model=m,tokenizer={model},num_concurrent=4,tokenized_requests=False",
        ], False),
    ]  # fmt: skip


def _run(client: Client, url: str) -> Result:
    command = [part.replace("URL", url) if part == "URL" or part.startswith("base_url=") else part
               for part in client.command]  # fmt: skip
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=BOUND_S)
    except subprocess.TimeoutExpired:
        return Result(1, "", f"not finished after {BOUND_S} s")
    return Result(done.returncode, done.stdout, done.stderr[-1500:])


def _word(result: Result) -> str:
    return "succeeds" if result.code == 0 else "fails"


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve(), sys.argv[2:]))
