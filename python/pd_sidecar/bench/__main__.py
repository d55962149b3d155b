"""The start of the program `pd-bench`, also as `python -m pd_sidecar.bench`."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command line of this process, and ends it with one of the exit codes of `--help`."""
    try:
        from pd_sidecar.bench.cli import run
    except ModuleNotFoundError as error:
        # The engine's environment has aiohttp, because vLLM needs it. An environment with the wheel alone has not.
        if error.name != "aiohttp":
            raise
        sys.stderr.write("pd-bench: the package aiohttp is missing; run `pip install 'pd-sidecar[bench]'`\n")
        sys.exit(64)
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
