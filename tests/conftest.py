"""What every test shares: the switches for long and GPU tests, and a digest cache of its own."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # One worker a core: threads of torch and numba in each would only wait for one another. Set
    # before either is imported; child processes inherit it.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure() -> None:
    # nohup and some schedulers hand down an ignored SIGHUP, which commands then ignore as well
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests that take minutes")


def _has_cuda() -> bool:
    try:
        import torch
    except ModuleNotFoundError:
        return False
    return torch.cuda.is_available()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    slow = pytest.mark.skip(reason="takes minutes; run with --slow")
    gpu = pytest.mark.skip(reason="needs a CUDA device; there is none")
    cuda = any("gpu" in item.keywords for item in items) and _has_cuda()
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(slow)
        if "gpu" in item.keywords and not cuda:
            item.add_marker(gpu)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    cache: Path = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("KILODELTA_CACHE", str(cache))


@pytest.fixture(autouse=True, scope="module")
def _traces_of_a_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Equal models are traced once (`support.traces`), by fixtures of a whole module as well."""
    with pytest.MonkeyPatch.context() as patch:
        _remember_traces(tmp_path_factory, patch)
        yield


@pytest.fixture(autouse=True)
def _traces_of_a_test(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same where a test before this one, of the same module, has loaded the exporter."""
    _remember_traces(tmp_path_factory, monkeypatch)


def _remember_traces(factory: pytest.TempPathFactory, patch: pytest.MonkeyPatch) -> None:
    named = sys.modules.get("kilodelta.export.onnx.named")
    if named is None or importlib.util.find_spec("onnxscript") is None:
        return
    from tests.support.traces import remembered, shared_folder

    if named.trace.__name__ == "trace":
        patch.setattr(named, "trace", remembered(named.trace, shared_folder(factory.getbasetemp())))


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Python's own answer to SIGINT, also where the tests run in a shell's background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
