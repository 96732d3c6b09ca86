"""Where compiled kernels are kept: beside the sources, in the cache folder, or nowhere."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from numba.core import config

from kilodelta.exact import compiled


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A machine whose package folder cannot be written, with an empty cache folder."""
    blocked = tmp_path / "package"
    blocked.write_text("a file, so that no folder can be made below it")
    monkeypatch.setattr(compiled, "SOURCES", blocked)
    monkeypatch.setattr(config, "CACHE_DIR", "")
    monkeypatch.setenv("KILODELTA_CACHE", str(tmp_path / "cache"))
    remembered = compiled.cache_folder, compiled.source_stamp
    for function in remembered:
        function.cache_clear()
    yield tmp_path / "cache"
    for function in remembered:
        function.cache_clear()


def three_times(x: int) -> int:
    return 3 * x


def files(folder: Path) -> list[str]:
    return sorted(path.suffix for path in (folder / "numba").glob("*"))


def test_a_read_only_package_keeps_its_kernels_in_the_cache_folder(own: Path) -> None:
    assert compiled.cache_folder() == own / "numba"
    assert compiled.kernel(three_times)(4) == 12
    assert files(own) == [".nbc", ".nbi"]
    again = compiled.kernel(three_times)
    assert again(5) == 15
    assert sum(again.stats.cache_hits.values()) == 1


def test_without_any_folder_kernels_are_compiled_all_the_same(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own.write_text("a file, so that no folder can be made here either")
    assert compiled.cache_folder() is None
    assert compiled.kernel(three_times)(4) == 12


@pytest.mark.parametrize("suffix", [".nbi", ".nbc"])
def test_a_damaged_cache_is_compiled_again(own: Path, suffix: str) -> None:
    compiled.kernel(three_times)(4)
    (path,) = (own / "numba").glob(f"*{suffix}")
    path.write_bytes(b"\x80garbage" * 9)
    assert compiled.kernel(three_times)(4) == 12
    again = compiled.kernel(three_times)
    again(4)
    assert sum(again.stats.cache_hits.values()) == 1


def test_a_full_disk_does_not_stop_a_kernel(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: object, name: str, data: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("numba.core.caching.IndexDataCacheFile._save_data", full)
    assert compiled.kernel(three_times)(4) == 12


def test_a_folder_that_others_can_write_is_not_loaded_from(own: Path) -> None:
    """What numba loads, it runs."""
    (own / "numba").mkdir(parents=True)
    os.chmod(own / "numba", 0o777)
    assert compiled.cache_folder() is None


def test_a_kernel_of_changed_sources_is_compiled_again(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of sources of which it only holds copies."""
    compiled.kernel(three_times)(4)
    monkeypatch.setattr(compiled, "source_stamp", lambda: "another")
    again = compiled.kernel(three_times)
    assert again(4) == 12
    assert not again.stats.cache_hits


def test_numbas_own_setting_is_obeyed(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path / "numba"))
    assert compiled.cache_folder() == tmp_path / "numba" / "kilodelta"


def test_code_that_is_loaded_does_not_make_numba_ready_to_compile(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That took most of the time of a command that merges little."""
    from numba.core.registry import cpu_target

    compiled.kernel(three_times)(4)
    again = compiled.kernel(three_times)
    monkeypatch.setattr(cpu_target.target_context, "refresh", None)
    assert again(5) == 15


def test_no_kernel_calls_what_loads_scipy() -> None:
    """numba's reductions of arrays live in its module `np.arraymath`, which loads scipy's linear
    algebra: a tenth of a second of every merge, the cached code's loading included."""
    reductions = {"all", "any", "cumsum", "dot", "max", "mean", "min", "prod", "sum"}
    found, kernels = [], 0
    for path in sorted(Path(compiled.__file__).parent.glob("*.py")):
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, ast.FunctionDef) or not any(
                "kernel" in ast.unparse(decorator) for decorator in function.decorator_list
            ):
                continue
            kernels += 1
            found += [
                f"{path.name}: {ast.unparse(node)}"
                for node in ast.walk(function)
                if isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in reductions
            ]
    assert kernels > 30
    assert not found
