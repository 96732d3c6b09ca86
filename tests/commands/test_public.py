"""What Python sees: public names alone, a help text that shows the way, a function per command."""

from __future__ import annotations

import importlib
import inspect
import pydoc
import subprocess
import sys
from pathlib import Path

import click
import pytest

import kilodelta
from kilodelta.cli import main
from tests.support import python_page

ROOT = Path(__file__).parents[2]
PACKAGES = ("kilodelta", "compress", "device", "export", "trust", "verify", "demo")


def test_a_module_shows_its_public_names_alone() -> None:
    assert dir(kilodelta) == [
        *("Checkpoint", "Delta", "__version__", "compress", "demo", "device", "digest"),
        *("dry_run", "export", "inspect", "load", "merge", "train", "trust", "verify"),
    ]
    for name in PACKAGES:
        module = kilodelta if name == "kilodelta" else getattr(kilodelta, name)
        assert set(module.__all__) <= set(dir(module))
        for public in module.__all__:
            assert getattr(module, public) is not None, f"{name}.{public}"
        with pytest.raises(AttributeError, match="no attribute 'nothing'"):
            module.nothing  # noqa: B018


def test_help_shows_the_way() -> None:
    text = pydoc.plain(pydoc.render_doc(kilodelta))
    for step in ("kilodelta.compress.compress(", "kilodelta.merge(", "kilodelta.device.apply("):
        assert step in text
    assert "digest(" in text


def test_without_torch_help_leaves_train_out() -> None:
    code = (
        "import sys\nclass Refuse:\n    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch':\n            raise ModuleNotFoundError(name=name)\n"
        "sys.meta_path.insert(0, Refuse())\nimport importlib.util\n"
        "real = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name: None if name == 'torch' else real(name)\n"
        "import kilodelta, inspect\n"
        "print([name for name, _ in inspect.getmembers(kilodelta)])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "train" not in done.stdout
    assert "device" in done.stdout


def test_importing_kilodelta_imports_nothing_else() -> None:
    code = "import sys, kilodelta\nprint([m for m in sys.modules if m.startswith('kilodelta')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout in ("['kilodelta']\n", "['kilodelta.lazy', 'kilodelta']\n")


COMMANDS = sorted(set(main.commands) - python_page.GROUPS)


def test_every_command_has_its_function() -> None:
    assert set(python_page.FUNCTIONS) == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_function_is_documented_and_typed(name: str) -> None:
    function = python_page.function_of(name)
    assert callable(function)
    assert not inspect.ismodule(function)
    text = inspect.getdoc(function) or ""
    assert text[0].isupper()
    signature = inspect.signature(function)
    for parameter in signature.parameters.values():
        assert parameter.annotation is not parameter.empty, f"{name}: {parameter.name}"
    assert signature.return_annotation is not signature.empty
    if len(signature.parameters) >= 4:
        documented = text.partition("Args:")[2]
        for taken in signature.parameters.keys() - {"options", "progress"}:  # the page has them
            assert f"{taken}:" in documented or f"{taken}, " in documented, f"{name}: {taken}"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_a_parameter_of_the_same_name(name: str) -> None:
    command = main.commands[name]
    known = python_page.parameters(python_page.function_of(name))
    for option in python_page.options(command):
        spelt = python_page.spelt(name, option, known)
        assert spelt is not None, f"kilodelta {name} {option.opts[0]} is no parameter"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_place_of_a_command_line_is_a_parameter(name: str) -> None:
    places = [p for p in main.commands[name].params if isinstance(p, click.Argument)]
    function = inspect.signature(python_page.function_of(name))
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
    assert len([p for p in function.parameters.values() if p.kind in kinds]) >= len(places)


def test_other_names_are_of_options_that_exist() -> None:
    for command, name in python_page.OTHER_NAMES:
        names = [python_page.long_name(o) for o in python_page.options(main.commands[command])]
        assert name.replace("_", "-") in names


def test_the_page_is_as_the_code_is() -> None:
    """Written anew by `python -m tests.support.python_page > docs/python.md`."""
    assert (ROOT / "docs" / "python.md").read_text(encoding="utf-8") == python_page.page()


def test_a_function_with_another_option_is_noticed() -> None:
    """The tests above can fail."""

    @click.command()
    @click.option("--depth", help="Depth.")
    @click.option("--targets", multiple=True, help="Targets.")
    def command() -> None: ...

    def function(*, targets: tuple[str, ...] = ()) -> None: ...

    known = python_page.parameters(function)
    depth, targets = python_page.options(command)
    assert python_page.spelt("x", depth, known) is None
    assert python_page.spelt("x", targets, known) == "`targets`"
    assert importlib.import_module("kilodelta") is kilodelta
