"""The house's two rules: imports only go down a floor, and a device needs no torch."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import kilodelta
from tests.support.processes import BLOCKED, GOLDEN, ROOT, run

FLOORS = {
    "files": 1,
    "exact": 2,
    "format": 3,
    "merging": 4,
    "models": 2,
    "compress": 5,
    "export": 5,
    "verify": 6,
    "device": 7,
}
ROOMS = {
    **{
        name: ROOT / "kilodelta" / name
        for name in ("files", "exact", "format", "merging", "models")
    },
    "compress": ROOT / "compress",
    "export": ROOT / "export",
    "verify": ROOT / "verify",
    "device": ROOT / "kilodelta" / "device",
}


def imported(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_imports_only_go_down_a_floor(room: str) -> None:
    files = list(ROOMS[room].rglob("*.py"))
    assert files
    for path in files:
        for name in imported(path):
            parts = name.split(".")
            assert parts[0] not in {"click", "rich"}, f"{path.name} knows the terminal"
            if parts[0] != "kilodelta" or len(parts) < 2:
                continue
            assert parts[1] not in {"cli", "commands", "terminal"}, (
                f"{path} imports the command line"
            )
            if parts[1] in FLOORS and parts[1] != room:
                assert FLOORS[parts[1]] < FLOORS[room], f"{path} imports {name}, up or across"


def test_no_test_module_imports_another() -> None:
    """Code that a test starts in another process counts as well, so the text is searched."""
    other = re.compile(r"(?:from|import)\s+tests(?:\.\w+)*\.test_\w+")
    for path in (ROOT / "tests").rglob("*.py"):
        assert not other.search(path.read_text()), f"{path} imports a test module"


def test_torch_is_named_in_one_module_of_the_ground_floor() -> None:
    users = {path.name for path in ROOMS["exact"].rglob("*.py") if "torch" in imported(path)}
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
    assert out.splitlines() == ["pip install 'kilodelta[torch]'", "7"]


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
