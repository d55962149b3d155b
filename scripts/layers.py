#!/usr/bin/env python3
"""Checks that imports between folders go in one direction only, in the order of `layers.toml`.

The script checks two rules for each tree of source files:

- A folder (or a file at the top of the tree) imports only from folders that are before it in `layers.toml`.

- No two files import each other, directly or through other files.

The script may be run from any folder. The script prints each finding as `file: text`. The exit code is 1 if there is a
finding. `--graph TREE` prints the imports. Test code is not checked, because a test may import anything.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIST = ROOT / "layers.toml"

Graph = dict[Path, set[Path]]
"""For each file, the files that it imports from."""


@dataclass(frozen=True)
class Tree:
    """The source of one crate or package, and its rooms (top folders and files) from the lowest to the highest."""

    root: Path
    rooms: list[str]


def trees() -> list[Tree]:
    """Returns the trees of `layers.toml`."""
    with LIST.open("rb") as file:
        listed = tomllib.load(file)
    return [Tree(ROOT / name, entry["rooms"]) for name, entry in listed.items()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--graph", metavar="TREE", help="print the imports of one tree of layers.toml, and check nothing"
    )
    wanted = parser.parse_args().graph
    found: list[str] = []
    for tree in trees():
        graph = imports(tree.root)
        if wanted is None:
            found += [*_upward(tree, graph), *_circles(tree, graph)]
        elif tree.root == ROOT / wanted:
            for file, targets in sorted(graph.items()):
                sys.stdout.write(f"{file}: {' '.join(str(target) for target in sorted(targets))}\n")
    for line in found:
        sys.stdout.write(f"{line}\n")
    return 1 if found else 0


def imports(root: Path) -> Graph:
    """Returns, for each file below `root`, the files from which it imports. Paths are relative to `root`."""
    rust = _rust_modules(root)
    if rust:
        return {file: set(_rust_imports(root, file, rust)) - {file} for file in rust.values()}
    files = {path.relative_to(root) for path in root.rglob("*.py")}
    return {file: set(_python_imports(root, file, files)) - {file} for file in files}


def _upward(tree: Tree, graph: Graph) -> Iterator[str]:
    """Yields each import from a higher room, and each room that is missing in the list."""
    name = tree.root.relative_to(ROOT)
    for file, targets in sorted(graph.items()):
        here = _room(file)
        if here not in tree.rooms:
            yield f"{name / file}: layers.toml does not list the room {here!r} of {name}"
            continue
        for target in sorted(targets):
            there = _room(target)
            if there in tree.rooms and tree.rooms.index(there) > tree.rooms.index(here):
                yield f"{name / file}: imports from {target}, but layers.toml lists {there!r} below {here!r}"


def _room(file: Path) -> str:
    """Returns the folder directly below the tree's root, or the name of a file that is directly below the root."""
    return file.parts[0] if len(file.parts) > 1 else file.stem


def _circles(tree: Tree, graph: Graph) -> Iterator[str]:
    """Yields each group of files that import each other."""
    for group in _strongly_connected(graph):
        if len(group) > 1:
            names = ", ".join(str(file) for file in sorted(group))
            yield f"{tree.root.relative_to(ROOT)}: {len(group)} files import each other: {names}"


def _strongly_connected(graph: Graph) -> Iterator[list[Path]]:
    """Yields the strongly connected components of a graph (Tarjan's algorithm)."""
    index: dict[Path, int] = {}
    low: dict[Path, int] = {}
    stack: list[Path] = []
    groups: list[list[Path]] = []

    def visit(file: Path) -> None:
        index[file] = low[file] = len(index)
        stack.append(file)
        for target in graph[file]:
            if target not in index:
                visit(target)
                low[file] = min(low[file], low[target])
            elif target in stack:
                low[file] = min(low[file], index[target])
        if low[file] == index[file]:
            at = stack.index(file)
            groups.append(stack[at:])
            del stack[at:]

    for file in sorted(graph):
        if file not in index:
            visit(file)
    yield from groups


# --- Rust


Module = tuple[str, ...]


def _rust_modules(root: Path) -> dict[Module, Path]:
    """Returns the file of each module path, without `main.rs`, `lib.rs` and test code."""
    modules: dict[Module, Path] = {}
    for path in root.rglob("*.rs"):
        file = path.relative_to(root)
        parts = file.with_suffix("").parts
        if "tests" in parts or parts in {("main",), ("lib",)}:
            continue
        modules[parts[:-1] if parts[-1] == "mod" else parts] = file
    return modules


def _rust_imports(root: Path, file: Path, modules: dict[Module, Path]) -> Iterator[Path]:
    here = next(module for module, path in modules.items() if path == file)
    # A module may be split into several files, which count as one file. So a file may import from the modules above it.
    whole = {modules.get(here[:length]) for length in range(len(here))}
    for path in _rust_paths(_without_tests((root / file).read_text(encoding="utf-8"))):
        module = _absolute(path, here, modules)
        # Find the longest beginning of the path that is a file. The rest is the name of an item in this file.
        while module and module not in modules:
            module = module[:-1]
        if module and modules[module] not in whole:
            yield modules[module]


def _absolute(path: Module, here: Module, modules: dict[Module, Path]) -> Module:
    """Returns a path as seen from the crate's root; `()` for a path that leads out of the crate."""
    if path[0] == "crate":
        return path[1:]
    base = here
    while path and path[0] in {"super", "self"}:
        base = base[:-1] if path[0] == "super" else base
        path = path[1:]
        if not path:
            return base
        if path[0] not in {"super", "self"}:
            return base + path
    # The path may begin with a module that this file declares: `child::Item` in the file with `mod child;`.
    return here + path if (*here, path[0]) in modules else ()


def _without_tests(text: str) -> str:
    """Returns the text without comments, and without everything below `#[cfg(test)] mod`."""
    text = re.sub(r"//[^\n]*", "", text)
    return re.split(r"#\[cfg\(test\)\]\s*(?:pub(?:\([a-z]+\))? )?mod \w+ \{", text)[0]


def _rust_paths(text: str) -> Iterator[Module]:
    """Yields every path in the text. Each path in the braces of a `use` is yielded on its own, in full."""
    for statement in re.finditer(r"\buse\s+([^;]+);", text):
        yield from _use_tree((), _tokens(statement[1]))
    for path in re.finditer(r"\b(?:crate|super|self|[a-z_]\w*)(?:::\w+)+", re.sub(r"\buse\s+[^;]+;", "", text)):
        yield tuple(path[0].split("::"))


def _tokens(text: str) -> list[str]:
    return re.findall(r"\w+|::|[{},*]", re.sub(r"\bas\s+\w+", "", text))


def _use_tree(prefix: Module, tokens: list[str]) -> Iterator[Module]:
    """Yields the paths of one tree of a `use`. Removes its tokens up to the comma or brace that ends the tree."""
    path = prefix
    while tokens and tokens[0] not in {",", "}"}:
        token = tokens.pop(0)
        if token == "{":
            while tokens and tokens[0] != "}":
                yield from _use_tree(path, tokens)
                if tokens and tokens[0] == ",":
                    tokens.pop(0)
            if tokens:
                tokens.pop(0)
            return
        if token not in {"::", "*"}:
            path = (*path, token)
    if path != prefix:
        yield path


# --- Python


def _python_imports(root: Path, file: Path, files: set[Path]) -> Iterator[Path]:
    """Yields the package's files that a file imports. Skips the imports that are only for type checkers."""
    for node in _statements(ast.parse((root / file).read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level:
            base = file.parent if node.level == 1 else file.parents[node.level - 1]
        elif node.module and node.module.split(".")[0] == root.name:
            base = Path()
        else:
            continue
        names = (node.module or "").split(".")
        module = base.joinpath(*(names if node.level else names[1:]))
        for alias in node.names:
            for candidate in (module / f"{alias.name}.py", Path(f"{module}.py"), module / "__init__.py"):
                if candidate in files:
                    yield candidate
                    break


def _statements(tree: ast.Module) -> Iterator[ast.AST]:
    """Yields every node except the nodes below `if TYPE_CHECKING`."""
    queue: list[ast.AST] = [tree]
    while queue:
        node = queue.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        queue.extend(ast.iter_child_nodes(node))


if __name__ == "__main__":
    sys.exit(main())
