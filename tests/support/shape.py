"""Print the shape of the source tree: `python -m tests.support.shape [ROOT]`.

For each folder its files; over all product files the median and 90th percentile of file and
function lengths, the share of comment lines, the share of public functions with four or more
parameters whose docstring has `Args:`, file and class names that occur more than once, and import
circles. ROOT is the repository by default; another checkout can be given for comparison.

Public is what a caller can reach: no functions inside of functions, and no methods of a class whose
name begins with an underscore. A method without a docstring
has that of the class which it overrides, as `inspect.getdoc` gives it. Commands of the command line
are left out, because their docstring is what `--help` prints, and their options explain themselves.
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
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
    """One function or method: where it is, its lines, parameters and docstring.

    Attributes:
        place: its module.
        owner: its class, or nothing.
        bases: that class's, by their last names.
        name: its own.
        lines: from `def` to its end.
        parameters: without `self` and `cls`.
        doc: its docstring, or nothing.
        public: whether a caller can reach it.
        command: whether the command line calls it.
    """

    place: str
    owner: str
    bases: tuple[str, ...]
    name: str
    lines: int
    parameters: int
    doc: str
    public: bool
    command: bool


def functions(place: str, tree: ast.Module) -> Iterator[Function]:
    """Yield every function of a module, nested ones and methods included."""
    pending: list[tuple[ast.AST, ast.ClassDef | None, bool]] = [(tree, None, False)]
    while pending:
        parent, owner, inside = pending.pop()
        for node in ast.iter_child_nodes(parent):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield _function(place, node, owner, nested=inside)
                pending.append((node, None, True))
            elif isinstance(node, ast.ClassDef):
                pending.append((node, node, inside))
            else:
                pending.append((node, owner, inside))


def _function(
    place: str,
    node: ast.FunctionDef | ast.AsyncFunctionDef,
    owner: ast.ClassDef | None,
    *,
    nested: bool,
) -> Function:
    given = node.args
    names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    bases = [] if owner is None else [ast.unparse(base) for base in owner.bases]
    own = "" if owner is None else owner.name
    return Function(
        place=place,
        owner=own,
        bases=tuple(base.partition("[")[0].rpartition(".")[2] for base in bases),
        name=node.name,
        lines=(node.end_lineno or node.lineno) - node.lineno + 1,
        parameters=len([n for n in names if n not in ("self", "cls")]),
        doc=ast.get_docstring(node) or "",
        public=not nested and not any(name.startswith("_") for name in (node.name, own)),
        command=any("command" in ast.unparse(one) for one in node.decorator_list),
    )


def lists_arguments(one: Function, everything: Sequence[Function]) -> bool:
    """Return whether a function's docstring, or the one that it inherits, has `Args:`."""
    if "Args:" in one.doc:
        return True
    overridden = [
        other
        for other in everything
        if other.owner in one.bases and other.name == one.name and other != one
    ]
    if overridden:
        return any(lists_arguments(other, everything) for other in overridden)
    parents = {base for other in everything if other.owner in one.bases for base in other.bases}
    return bool(parents) and lists_arguments(replace(one, bases=tuple(parents)), everything)


def silent_about_arguments(everything: Sequence[Function], most: int = 3) -> list[str]:
    """Return the public functions of more than `most` parameters that do not list them."""
    return [
        f"{one.place}: {one.owner}.{one.name}" if one.owner else f"{one.place}: {one.name}"
        for one in everything
        if one.public and not one.command and one.parameters > most
        if not lists_arguments(one, everything)
    ]


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
    many = [f for f in found if f.public and not f.command and f.parameters >= 4]
    silent = silent_about_arguments(found)
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
        f" {len(many) - len(silent)} have Args:; not {silent or 'one is left'}",
        f"file names that occur more than once: {repeated([p.name for p in files])}",
        f"public class names that occur more than once: {repeated(classes)}",
        f"import circles: {circles(import_graph(trees)) or 'none'}",
    ]
    return "\n".join(out) + "\n"


if __name__ == "__main__":
    sys.stdout.write(report(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT))
