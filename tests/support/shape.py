"""Print the shape of the source tree: `python -m tests.support.shape [ROOT]`.

For each folder its files; over all product files the median and 90th percentile of file and
function lengths, the share of comment lines, the share of public functions with four or more
parameters whose docstring has `Args:`, file and class names that occur more than once, and import
circles. ROOT is the repository by default; another checkout can be given for comparison.
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

ROOT = Path(__file__).parents[2]
TOPS = ("kilodelta", "compress", "export", "verify")


def product_files(root: Path = ROOT) -> list[Path]:
    """Return the product's Python files, each once: the links inside `kilodelta/` are skipped."""
    return sorted(
        path
        for top in TOPS
        for path in (root / top).rglob("*.py")
        if not any(p.is_symlink() for p in path.parents if p != root)
    )


def module_name(path: Path, root: Path = ROOT) -> str:
    """Return the dotted name under which a product file is imported."""
    parts = list(path.relative_to(root).with_suffix("").parts)
    if parts[0] != "kilodelta":
        parts.insert(0, "kilodelta")
    if parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts)


def imports_at_load(tree: ast.Module) -> Iterator[str]:
    """Yield the modules that are imported while a module loads.

    Imports inside functions and under `TYPE_CHECKING` run later or never, so they make no circle
    for the interpreter and none for a reader who follows what a module needs to exist.
    """
    pending: list[ast.stmt] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.dump(node.test):
            pending += [*node.body, *node.orelse]
        elif isinstance(node, (ast.Try, ast.With, ast.ClassDef)):
            pending += node.body


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the strongly connected components of more than one module (Tarjan, 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    out: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in graph[name]:
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            component = []
            while True:
                component.append(stack.pop())
                if component[-1] == name:
                    break
            if len(component) > 1 or name in graph[name]:
                out.append(sorted(component))

    for name in sorted(graph):
        if name not in index:
            visit(name)
    return sorted(out)


def import_graph(trees: dict[str, ast.Module]) -> dict[str, set[str]]:
    """Return which of the modules each of them imports while it loads."""
    return {
        name: {other for other in imports_at_load(tree) if other in trees and other != name}
        for name, tree in trees.items()
    }


@dataclass(frozen=True, kw_only=True)
class Function:
    """One function or method: where it is, its lines, parameters and docstring."""

    place: str
    name: str
    lines: int
    parameters: int
    doc: str
    public: bool


def functions(name: str, tree: ast.Module) -> Iterator[Function]:
    """Yield every function of a module, nested ones and methods included."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            given = node.args
            names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
            yield Function(
                place=name,
                name=node.name,
                lines=(node.end_lineno or node.lineno) - node.lineno + 1,
                parameters=len([n for n in names if n not in ("self", "cls")]),
                doc=ast.get_docstring(node) or "",
                public=not node.name.startswith("_"),
            )


def comment_share(text: str) -> float:
    """Return the share of lines that hold a comment, tool directives aside."""
    comments = [
        token
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type == tokenize.COMMENT
        and not token.string.startswith(("# type:", "# noqa", "#!"))
    ]
    return len(comments) / max(1, text.count("\n"))


def repeated(names: list[str]) -> dict[str, int]:
    """Return the names that occur more than once, with how often."""
    return {name: count for name, count in sorted(Counter(names).items()) if count > 1}


def report(root: Path = ROOT) -> str:
    """Return the figures as text, one a line."""
    files = product_files(root)
    texts = {path: path.read_text() for path in files}
    trees = {module_name(path, root): ast.parse(text) for path, text in texts.items()}
    found = [f for name, tree in trees.items() for f in functions(name, tree)]
    lines = sorted(text.count("\n") for text in texts.values())
    lengths = [f.lines for f in found]
    many = [f for f in found if f.public and f.parameters >= 4]
    public = [f for f in found if f.public]
    classes = [
        node.name
        for tree in trees.values()
        for node in tree.body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    ]
    folders = Counter(str(path.parent.relative_to(root)) for path in files)
    code = sum(lines)
    comments = sum(comment_share(t) * t.count("\n") for t in texts.values())
    out = [f"{count:4d}  {folder}" for folder, count in sorted(folders.items())]
    out += [
        f"files: {len(files)}, lines: {code}, median {median(lines):.0f} a file,"
        f" over 250: {sum(n > 250 for n in lines)}, over 300: {sum(n > 300 for n in lines)}",
        f"functions: {len(found)}, median {median(lengths):.0f} lines,"
        f" 90th percentile {quantiles(lengths, n=10)[-1]:.0f}",
        f"comment lines: {100 * comments / code:.1f} %",
        f"public functions with a docstring: {sum(bool(f.doc) for f in public)} of {len(public)}",
        f"of {len(many)} public functions with 4 or more parameters,"
        f" {sum('Args:' in f.doc for f in many)} have Args:",
        f"file names that occur more than once: {repeated([p.name for p in files])}",
        f"public class names that occur more than once: {repeated(classes)}",
        f"import circles: {circles(import_graph(trees)) or 'none'}",
    ]
    return "\n".join(out) + "\n"


if __name__ == "__main__":
    sys.stdout.write(report(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT))
