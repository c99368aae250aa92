"""How the code is built, counted with `ast`: arrows between modules, and how dense the lines are.

python -m tests.support.house        # a table by folder
"""

import ast
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIBRARY = ("pipeline", "kernels", "serve_app", "jobs")
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
LONGEST_FUNCTION = 60

Function = ast.FunctionDef | ast.AsyncFunctionDef


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


def library_files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


@cache
def import_graph(*folders: str) -> dict[str, set[str]]:
    """Modules of ours by the modules that import them: `graph["jobs.train"]` holds what it imports.

    Imports inside functions count as well.
    """
    trees = {module_name(path): ast.parse(path.read_text()) for path in library_files(*folders)}
    graph: dict[str, set[str]] = {}

    for name, tree in trees.items():
        imported = {module for module in _imported(tree, trees) if module != name}
        graph[name] = imported
    return graph


def _imported(tree: ast.Module, known: dict[str, ast.Module]) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)

        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                if submodule in known:
                    yield submodule
                elif node.module in known:
                    yield node.module


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that reach each other (strongly connected, two or more), by Tarjan."""
    index: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = lowest[name] = len(index)
        stack.append(name)

        for other in sorted(graph[name]):
            if other not in index:
                visit(other)
                lowest[name] = min(lowest[name], lowest[other])
            elif other in stack:
                lowest[name] = min(lowest[name], index[other])

        if lowest[name] == index[name]:
            at = stack.index(name)
            group = stack[at:]
            del stack[at:]
            if len(group) > 1:
                found.append(sorted(group))

    for name in sorted(graph):
        if name not in index:
            visit(name)
    return found


@dataclass
class Density:
    """Counts over some files; `share` and `per_thousand` turn them into the figures of a house."""

    code_lines: int = 0  # neither blank nor comment nor docstring
    comprehensions: int = 0
    lines_in_functions: int = 0
    blank_in_functions: int = 0
    public_names: int = 0  # functions and methods without a leading underscore
    one_word_names: int = 0
    take_run_config: int = 0  # functions with a parameter annotated RunConfig
    long_functions: int = 0  # more than LONGEST_FUNCTION lines

    def add_file(self, source: str) -> None:
        tree, lines = ast.parse(source), source.splitlines()
        self.code_lines += len(_code_lines(tree, lines))
        nodes = list(ast.walk(tree))
        self.comprehensions += sum(isinstance(node, COMPREHENSIONS) for node in nodes)

        for node in nodes:
            if isinstance(node, Function):
                self._add_function(node, lines)

    def _add_function(self, node: Function, lines: list[str]) -> None:
        body = lines[node.lineno - 1 : node.end_lineno]
        self.lines_in_functions += len(body)
        self.blank_in_functions += sum(not line.strip() for line in body)
        self.long_functions += len(body) > LONGEST_FUNCTION

        if not node.name.startswith("_"):
            self.public_names += 1
            self.one_word_names += "_" not in node.name

        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        annotations = [ast.unparse(one.annotation) for one in arguments if one.annotation]
        self.take_run_config += any("RunConfig" in text.split(" | ") for text in annotations)

    def row(self) -> str:
        return (
            f"{self.code_lines:7} {1000 * self.comprehensions / max(1, self.code_lines):8.1f}"
            f" {self.blank_in_functions / max(1, self.lines_in_functions):8.1%}"
            f" {self.one_word_names / max(1, self.public_names):9.1%}"
            f" {self.take_run_config:10} {self.long_functions:6}"
        )


def _code_lines(tree: ast.Module, lines: list[str]) -> set[int]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            first = node.body[0]
            texts |= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))

    numbered = enumerate(lines, 1)
    return {
        number
        for number, line in numbered
        if line.strip() and not line.lstrip().startswith("#") and number not in texts
    }


def density(*folders: str) -> Density:
    """Counts over all files of the folders."""
    total = Density()
    for path in library_files(*folders):
        total.add_file(path.read_text())
    return total


def main() -> None:
    rooms: dict[str, list[Path]] = defaultdict(list)
    for path in library_files(*LIBRARY):
        parent = path.parent.relative_to(ROOT)
        rooms["/".join(parent.parts[:2])].append(path)

    print(
        f"{'':28} {'lines':>7} {'compr.':>8} {'blank':>8} {'one word':>9} {'RunConfig':>10}"
        f" {'long':>6}"
    )
    for room, paths in sorted(rooms.items()):
        counted = Density()
        for path in paths:
            counted.add_file(path.read_text())
        print(f"{room:28} {counted.row()}")
    print(f"{'all':28} {density(*LIBRARY).row()}")


if __name__ == "__main__":
    main()
