#!/usr/bin/env python3
"""Checks the tree for faults that no linter reports: long files, paths of one machine, leftovers, unclear docs.

The script may be run from any folder. The script prints each finding as `file:line: text`. The exit code is 1 if there
is a finding, otherwise 0.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# A longer file contains several subjects, and its name cannot name all of them.
MAX_LINES = 500
# Test files that are tables of cases may be longer.
MAX_TEST_LINES = 1000
# Files written by a tool, and the licence.
LONG_BY_NATURE = ("Cargo.lock", "LICENSE", "nixl-sys/src/bindings.rs")

# A path of the author's machine is wrong on all other machines.
MACHINE_PATH = re.compile(r"(?<![\w.~$}{/-])/(?:home|root|work|Users|mnt|opt)/[\w.]")
LEFTOVER = re.compile(r"\b(?:FIXME|XXX|HACK)\b|\bdbg!\(|^<{7} |^>{7} ")

# Documentation that begins with one of these words asks a question instead of naming a thing.
UNCLEAR_OPENINGS = ("What", "How", "Whose", "Of", "Whether", "Where", "Who")
# Only these folders are checked for unclear openings. Add a folder when its documentation is rewritten.
PLAIN_FOLDERS = (
    "common/", "discovery/", "nixl/", "nixl-sys/", "protocol/", "proxy/", "python/", "scripts/", "sidecar/",
    "tests/bench/", "tests/gpu/", "tests/harness/", "tests/processes/drop_in/",
)  # fmt: skip
RUST_DOC = re.compile(r"\s*//[/!]( |$)")

# A transport needs only its folder, its `mod` line, and its name in the table and in the protocol's list, so that a new
# transport changes few files. Other code must use the table. The files in `OTHER_MEANINGS` use a transport's name with
# another meaning.
TRANSPORTS = Path("sidecar/src/transport")
TRANSPORT_USERS = ("sidecar/src/", "proxy/src/", "protocol/src/")
TRANSPORT_LISTS = ("sidecar/src/transport/table.rs", "protocol/src/record.rs")
OTHER_MEANINGS = {
    "sidecar/src/config/checks.rs": "LMCache's transfer channel",
    "sidecar/src/config/keys.rs": "LMCache's transfer channel",
    "sidecar/src/config/layers.rs": "the scheme of a URL",
    "sidecar/src/config/mooncake.rs": "Mooncake's protocol",
    "sidecar/src/doctor/ucx.rs": "a transport of UCX",
    "sidecar/src/observe/listening.rs": "a table of the kernel",
    "sidecar/src/transport/ucx.rs": "a transport of UCX",
    "proxy/src/config/cli.rs": "the scheme of a URL",
    "proxy/src/fleet/sources.rs": "a connector of vLLM",
    "protocol/src/receiver/lmcache/claims.rs": "the only transport of LMCache",
}

TEXT = {".rs", ".py", ".sh", ".md", ".toml", ".yaml", ".yml", ".h", ".txt", ""}


def tracked() -> list[str]:
    """Returns the paths of all files that git tracks or would add."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    return [name for name in listing.stdout.splitlines() if (ROOT / name).is_file()]


def rust_docs(text: str) -> Iterator[tuple[int, str]]:
    """Yields the first line of each block of documentation comments, with its line number."""
    inside = False
    for number, line in enumerate(text.splitlines(), start=1):
        if (match := RUST_DOC.match(line)) and not inside:
            yield number, line[match.end() :].strip()
        inside = match is not None


def python_docs(text: str) -> Iterator[tuple[int, str]]:
    """Yields the first line of each docstring, with its line number. Strings below a variable are docstrings, too."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value.strip().partition("\n")[0]


def unclear_openings(text: str, suffix: str) -> list[tuple[int, str]]:
    """Returns the documentation in `text` that begins with a word of `UNCLEAR_OPENINGS`, with line numbers."""
    docs = {".rs": rust_docs, ".py": python_docs}.get(suffix)
    if docs is None:
        return []
    return sorted((number, first) for number, first in docs(text) if first.partition(" ")[0] in UNCLEAR_OPENINGS)


def check_of_openings_works() -> bool:
    """Returns true if the check of the openings finds exactly the unclear openings in two samples.

    If this test did not exist, a mistake in the check would look like a tree without findings.
    """
    rust = "//! Of a peer.\n\n/// Returns a name.\n/// What follows.\nfn f() {}\n    /// How many.\n// Who reads?\n"
    python = '"""Where it is."""\nPORT = 1\n"""Whose port."""\ndef f():\n    """Returns 1.\n\n    Who asks.\n    """\n'
    found = [[number for number, _ in unclear_openings(*sample)] for sample in ((rust, ".rs"), (python, ".py"))]
    return found == [[1, 6], [1, 3]]


def transport_names() -> list[str]:
    """Returns the names of the sidecar's transports, which are the names of the folders that state a `KIND`."""
    folders = (ROOT / TRANSPORTS).glob("*/mod.rs")
    return sorted(path.parent.name for path in folders if " const KIND: " in path.read_text())


def named_transports(text: str, names: list[str]) -> list[tuple[int, str]]:
    """Returns the lines of Rust code that name a transport by its text or by its module, with line numbers.

    Comments and tests may name transports. The unit tests are at the end of a file.
    """
    any_name = "|".join(names)
    naming = re.compile(rf'"(?:{any_name})"|\btransport::(?:\{{[^}}]*)?\b(?:{any_name})\b|\b(?:{any_name})::KIND\b')
    code = re.split(r"^#\[cfg\(test\)\]\n(?:pub\(crate\) )?mod \w+ \{", text, flags=re.MULTILINE)[0]
    code = re.sub(r"//.*", "", code)
    return [(code.count("\n", 0, found.start()) + 1, found.group()) for found in naming.finditer(code)]


def check_of_transports_works() -> bool:
    """Returns true if the check of the names of transports finds exactly the forbidden lines in a sample."""
    wrong = 'if kind == "tcp" {}\nuse crate::transport::nixl::A;\nuse crate::transport::{\n    tcp,\n};\ntcp::KIND;\n'
    right = '// "tcp"\nlet table = "tcp6";\nimpl nixl::Pinned for A {}\n#[cfg(test)]\nmod tests {\n    "tcp"\n}\n'
    found = [number for number, _ in named_transports(wrong + right, ["nixl", "tcp"])]
    return found == [1, 2, 3, 6] and {"nixl", "tcp"} <= set(transport_names())


def may_name_transports(name: str) -> bool:
    """Returns true if a file may name transports: a transport's file, a list, a test, or a file of `OTHER_MEANINGS`."""
    parts = Path(name).parts
    in_folder = parts[: len(TRANSPORTS.parts)] == TRANSPORTS.parts and len(parts) > len(TRANSPORTS.parts) + 1
    is_test = "tests" in parts or parts[-1] == "tests.rs"
    return in_folder or is_test or name in TRANSPORT_LISTS or name in OTHER_MEANINGS


def findings(name: str) -> list[str]:
    """Returns the findings of one file."""
    path = ROOT / name
    if path.suffix not in TEXT:
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        return []
    found = []
    limit = MAX_TEST_LINES if path.name == "tests.rs" else MAX_LINES
    if len(lines) > limit and name not in LONG_BY_NATURE and path.suffix in {".rs", ".py", ".sh"}:
        found.append(f"{name}:{len(lines)}: longer than {limit} lines")
    for number, line in enumerate(lines, start=1):
        if name != "scripts/tidy.py" and LEFTOVER.search(line):
            found.append(f"{name}:{number}: leftover: {line.strip()}")
        if MACHINE_PATH.search(line):
            found.append(f"{name}:{number}: path of one machine: {line.strip()}")
        if line != line.rstrip() and path.suffix != ".md" and name != "LICENSE":
            found.append(f"{name}:{number}: trailing white space")
    if path.suffix == ".rs" and name.startswith(TRANSPORT_USERS) and not may_name_transports(name):
        for number, named in named_transports("\n".join(lines), transport_names()):
            found.append(f"{name}:{number}: names a transport outside its folder; ask transport/table.rs: {named}")
    if name.startswith(PLAIN_FOLDERS):
        for number, first in unclear_openings("\n".join(lines), path.suffix):
            found.append(f"{name}:{number}: documentation begins with a question word; name the thing: {first}")
    return found


def main() -> int:
    if not check_of_openings_works():
        print("scripts/tidy.py: the check of the openings does not find the faults in its own samples")
        return 1
    if not check_of_transports_works():
        print("scripts/tidy.py: the check of the names of transports does not find the faults in its own sample")
        return 1
    found = [line for name in tracked() for line in findings(name)]
    print("\n".join(found) or "tidy: nothing found")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
