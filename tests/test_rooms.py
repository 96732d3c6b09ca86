"""The house's two rules: imports only go down a floor, and a device needs no torch."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

import kilodelta
from tests.support import shape
from tests.support.processes import BLOCKED, GOLDEN, ROOT, run

BELOW: dict[str, frozenset[str]] = {
    "files": frozenset(),
    "exact": frozenset({"files"}),
    "grid": frozenset({"files", "exact"}),
    "format": frozenset({"files", "exact", "grid"}),
    "merging": frozenset({"files", "exact", "format", "grid"}),
    "models": frozenset({"files"}),
}
"""Each room, and the rooms that it may import; `errors` and `progress` are open to all."""
BELOW["report"] = frozenset({"files"})
BELOW["trust"] = frozenset({"files"})
BELOW["compress"] = frozenset(BELOW)
BELOW["export"] = BELOW["compress"]
BELOW["verify"] = frozenset(BELOW)
BELOW["device"] = frozenset({*BELOW["verify"], "verify"})
BELOW["fleet"] = frozenset(BELOW)
TOPS = ("compress", "export", "verify")
ROOMS = {name: ROOT / (name if name in TOPS else f"kilodelta/{name}") for name in BELOW}
COMMAND_LINE = {"cli", "commands", "terminal", "demo"}
METHOD_PART = re.compile(r"kilodelta\.format\.methods\.\w+\.(train|gpu)(?:\.|\Z)")
PARTS = {"train": "compress", "gpu": "merging"}
"""Files of a method's folder that stand on the floor of the room that loads them by name."""


def imported(tree: ast.Module) -> set[str]:
    """Everything that a module imports, inside functions as well."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def faults(room: str, tree: ast.Module) -> list[str]:
    """What a module of a room imports although the room may not."""
    out = []
    for name in imported(tree):
        parts = name.split(".")
        if parts[0] in {"click", "rich"}:
            out.append(f"{name}: only the command line knows the terminal")
        if parts[0] != "kilodelta" or len(parts) < 2:
            continue
        if parts[1] in COMMAND_LINE:
            out.append(f"{name}: the library does not know the command line")
        part = METHOD_PART.match(name)
        if part and room not in (PARTS[part[1]], "compress"):
            out.append(f"{name}: a method's part is loaded by name, not imported from below")
        if parts[1] in BELOW and parts[1] != room and parts[1] not in BELOW[room]:
            out.append(f"{name}: up or across a floor")
    return out


def floor_of(path: Path, room: str) -> str:
    """The room on whose floor a file stands: its own, but for the parts of a method."""
    is_part = path.parent.parent == ROOT / "kilodelta" / "format" / "methods"
    return PARTS.get(path.stem, room) if is_part else room


@pytest.mark.parametrize("room", ROOMS)
def test_imports_only_go_down_a_floor(room: str) -> None:
    files = list(ROOMS[room].rglob("*.py"))
    assert files
    for path in files:
        assert not faults(floor_of(path, room), ast.parse(path.read_text())), path


@pytest.mark.parametrize(
    ("room", "line"),
    [
        ("files", "from kilodelta.format.delta import Delta"),
        ("models", "from kilodelta import merging"),
        ("export", "def later():\n    from kilodelta.compress import compress"),
        ("verify", "import kilodelta.device.serving"),
        ("exact", "import rich.table"),
        ("device", "from kilodelta.commands.common import threads"),
        ("format", "from kilodelta.format.methods.nola.train import NolaFactors"),
        ("merging", "from kilodelta.format.methods.nola import train"),
        ("format", "def later():\n    import kilodelta.format.methods.vera.gpu"),
    ],
)
def test_an_import_up_a_floor_is_a_fault(room: str, line: str) -> None:
    """The test above can fail: one fault for each kind of wrong import."""
    assert faults(room, ast.parse(line))
    assert not faults(room, ast.parse("import json\nfrom kilodelta.errors import InputError"))


def test_no_module_needs_itself_to_load() -> None:
    trees = {shape.module_name(p): ast.parse(p.read_text()) for p in shape.product_files()}
    assert shape.circles(shape.import_graph(trees)) == []


def test_a_circle_is_found() -> None:
    sources = {
        "a": "from b import x",
        "b": "if True:\n    import c",
        "c": "import a",
        "d": "import a\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import e",
        "e": "import d\ndef later():\n    import a",
    }
    graph = shape.import_graph({name: ast.parse(text) for name, text in sources.items()})
    assert shape.circles(graph) == [["a", "b", "c"]]


def test_functions_of_four_parameters_list_them() -> None:
    everything = [
        function
        for path in shape.product_files()
        for function in shape.functions(shape.module_name(path), ast.parse(path.read_text()))
    ]
    assert shape.silent_about_arguments(everything) == []


def test_a_silent_function_would_be_named() -> None:
    """The test above can fail; a method may inherit its list, and a command needs none."""
    source = (
        "def silent(a, b, c, d): 'Add.'\n"
        'class Base:\n    def add(self, a, b, c, d):\n        "Add.\\n\\nArgs:\\n  a: b"\n'
        "class Own(Base):\n    def add(self, a, b, c, d): ...\n"
        "class Other:\n    def add(self, a, b, c, d): ...\n"
        "@click.command()\ndef merge(a, b, c, d): 'Merge.'\n"
        "def _own(a, b, c, d): ...\n"
        "def few(a, b, c):\n    def inner(a, b, c, d): ...\n"
    )
    named = shape.silent_about_arguments(list(shape.functions("room", ast.parse(source))))
    assert sorted(named) == ["room: Other.add", "room: silent"]


def test_no_folder_holds_more_than_eighteen_files() -> None:
    folders = Counter(path.parent for path in shape.product_files())
    assert {str(f): n for f, n in folders.items() if n > 18} == {}


def test_no_test_module_imports_another() -> None:
    """Code that a test starts in another process counts as well, so the text is searched."""
    other = re.compile(r"(?:from|import)\s+tests(?:\.\w+)*\.test_\w+")
    for path in (ROOT / "tests").rglob("*.py"):
        assert not other.search(path.read_text()), f"{path} imports a test module"


def test_torch_is_named_in_one_module_of_the_ground_floor() -> None:
    users = {
        path.name
        for room in ("files", "exact", "grid", "format")
        for path in ROOMS[room].rglob("*.py")
        if floor_of(path, room) == room and "torch" in imported(ast.parse(path.read_text()))
    }
    assert users == {"products.py"}


def test_the_package_list_equals_the_disk() -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11 and newer
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    places = settings["package-dir"]
    on_disk = set()
    rooms = [init for room in ROOMS.values() for init in room.rglob("__init__.py")]
    rooms += [*ROOT.glob("*/__init__.py"), *(ROOT / "kilodelta").rglob("__init__.py")]
    for init in rooms:
        folder = init.parent.relative_to(ROOT)
        if folder.parts[0] in {"tests", "examples", "benchmarks"}:
            continue
        name = ".".join(folder.parts)
        on_disk.add(name if folder.parts[0] == "kilodelta" else f"kilodelta.{name}")
    assert set(settings["packages"]) == on_disk
    for name in ("compress", "export", "verify"):
        assert places[f"kilodelta.{name}"] == name
        assert (ROOT / "kilodelta" / name).is_symlink()


def test_a_device_without_torch_inspects_merges_and_proves(tmp_path: Path) -> None:
    out = run(
        f"{BLOCKED}\nimport kilodelta\nfrom kilodelta.verify.digests.proof import prove\n"
        f"from kilodelta.exact import products\n"
        f"base, file = {str(GOLDEN / 'base.safetensors')!r}, {str(GOLDEN / 'randlora-8.kd')!r}\n"
        f"print(kilodelta.inspect(file).method['name'])\n"
        f"kilodelta.merge(base, file, {str(tmp_path / 'out.safetensors')!r})\n"
        f"print(prove(base, file, {str(tmp_path / 'out.safetensors')!r}).targets)\n"
        f"print(products._int8_unit().__name__)\n"
    )
    assert out.split() == ["randlora", "4", "by_float32"]


def test_training_without_torch_names_the_extra() -> None:
    out = run(
        f"{BLOCKED}\nimport kilodelta\nfrom click.testing import CliRunner\n"
        "from kilodelta.cli import main\nfrom kilodelta.errors import MissingPackageError\n"
        "try:\n    kilodelta.train\nexcept MissingPackageError as error:\n    print(error.fix)\n"
        "print(CliRunner().invoke(main, ['compress', 'a', 'b', '-o', 'c']).exit_code)\n"
    )
    assert out.splitlines() == ["in a clone of kilodelta: pip install '.[torch]'", "7"]


def test_help_imports_nothing_heavy() -> None:
    out = run(
        "import sys\nfrom click.testing import CliRunner\nfrom kilodelta.cli import main\n"
        "result = CliRunner().invoke(main, ['--help'])\n"
        "assert result.exit_code == 0\n"
        "print([m for m in ('numba', 'numpy', 'rich', 'torch', 'safetensors') if m in sys.modules])"
    )
    assert out.strip() == "[]"


def test_the_public_names_are_there() -> None:
    for name in kilodelta.__all__:
        assert callable(getattr(kilodelta, name))
        assert name in dir(kilodelta)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        kilodelta.nothing  # noqa: B018
