"""The doctor, on machines built from files: packages that are doubled, damaged, or kill Python."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kilodelta.export.tensorrt import cuda
from kilodelta.verify import doctor as examine
from kilodelta.verify.environment import doctor, packages, runtimes
from kilodelta.verify.environment.runtimes import BROKEN, CONFLICT, MISSING, OK

RTX = cuda.Gpu(name="Fake RTX", capability=(8, 9), memory_bytes=12 * 10**9)

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Put a package before all others on the path, for this process and those it starts."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def put(wheel: str, version: str, module: str, source: str = "") -> None:
        info = tmp_path / f"{wheel.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        metadata = f"Metadata-Version: 2.1\nName: {wheel}\nVersion: {version}\n"
        (info / "METADATA").write_text(metadata)
        (info / "top_level.txt").write_text(module)
        (tmp_path / module).mkdir(exist_ok=True)
        (tmp_path / module / "__init__.py").write_text(source)

    return put


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver for CUDA 12.4 with one GPU."""

    class Fake:
        def version(self) -> tuple[int, int]:
            return 12, 4

        def gpus(self) -> tuple[cuda.Gpu, ...]:
            return (RTX,)

    monkeypatch.setattr(doctor, "driver", Fake)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise cuda.CudaError("no NVIDIA driver")

    monkeypatch.setattr(doctor, "driver", fail)


def onnxruntime(*providers: str) -> str:
    return f"__version__ = '9.9'\ndef get_available_providers(): return {list(providers)}\n"


def test_this_machine_without_heavy_imports() -> None:
    code = (
        "import sys\nfrom kilodelta.verify import doctor\nfound = doctor()\n"
        "import json; print(json.dumps(found.to_json(), allow_nan=False))\n"
        "heavy = {'torch', 'numba', 'transformers', 'peft', 'onnxruntime', 'tensorrt_rtx'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found, heavy = done.stdout.strip().splitlines()
    assert heavy == "[]"
    topics = [finding["topic"] for finding in json.loads(found)["findings"]]
    assert topics[:3] == ["system", "gpu", "torch"]
    assert topics[-3:] == ["onnxruntime", "tensorrt", "tensorrt_rtx"]


@pytest.mark.usefixtures("no_gpu")
def test_both_wheels_of_onnx_runtime(install: Install) -> None:
    install("onnxruntime", "9.9", "onnxruntime", onnxruntime("CPUExecutionProvider"))
    install("onnxruntime-gpu", "9.8", "onnxruntime", onnxruntime("CPUExecutionProvider"))
    found = examine()["onnxruntime"]
    assert found.status == CONFLICT
    assert found.value.startswith("onnxruntime 9.9, onnxruntime-gpu 9.8: they cannot live")
    assert found.fix == (
        "in a clone of kilodelta: "
        "pip uninstall -y onnxruntime onnxruntime-gpu && pip install '.[cpu]'"
    )


@pytest.mark.usefixtures("gpu")
def test_a_gpu_wants_the_wheel_for_gpus(install: Install) -> None:
    install("onnxruntime", "9.9", "onnxruntime", onnxruntime("CPUExecutionProvider"))
    found = examine()["onnxruntime"]
    assert found.status == CONFLICT
    assert found.fix.endswith("pip uninstall -y onnxruntime && pip install '.[gpu]'")


SESSION = """
import sys
class InferenceSession:
    def __init__(self, model, providers): assert len(model) == 60
    def get_providers(self):
        sys.stderr.write("\\x1b[31mRequire cuDNN 9.*\\x1b[m\\n")
        return [{!r}, "CPUExecutionProvider"]
"""


@pytest.mark.usefixtures("gpu")
def test_cuda_has_to_load_in_earnest(install: Install) -> None:
    both = onnxruntime("CUDAExecutionProvider", "CPUExecutionProvider")
    session = SESSION.format("CPUExecutionProvider")
    install("onnxruntime", "9.9", "onnxruntime", both + session)
    found = examine()["onnxruntime"]
    assert found.status == BROKEN
    assert found.value.endswith("but CUDA does not load: Require cuDNN 9.*")
    assert found.fix == "pip install 'onnxruntime-gpu[cuda,cudnn]'"


@pytest.mark.usefixtures("gpu")
def test_cuda_that_loads(install: Install) -> None:
    both = onnxruntime("CUDAExecutionProvider", "CPUExecutionProvider")
    session = SESSION.format("CUDAExecutionProvider")
    install("onnxruntime", "9.9", "onnxruntime", both + session)
    found = examine()["onnxruntime"]
    assert (found.status, found.fix) == (OK, "")
    assert found.value.endswith("CUDAExecutionProvider, CPUExecutionProvider; CUDA loads")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import os; os.abort()", "its import crashes Python (signal 6)"),
        ("raise OSError('libcudart.so.99 is missing')", "libcudart.so.99 is missing"),
        ("", "AttributeError"),  # what uninstalling one of two wheels leaves behind
        ("import time; time.sleep(60)", "timed out"),
    ],
)
@pytest.mark.usefixtures("no_gpu")
def test_a_broken_package_is_reported(
    install: Install, monkeypatch: pytest.MonkeyPatch, source: str, reason: str
) -> None:
    if "sleep" in source:
        monkeypatch.setattr(packages, "TIMEOUT_SECONDS", 0.5)
    install("onnxruntime", "9.9", "onnxruntime", source)
    found = examine()["onnxruntime"]
    assert found.status == BROKEN
    assert reason in found.value
    assert found.fix == "pip install --force-reinstall --no-deps onnxruntime"


@pytest.mark.usefixtures("no_gpu")
def test_damaged_metadata_does_not_stop_the_doctor(install: Install, tmp_path: Path) -> None:
    install("peft", "1.0", "peft")
    (tmp_path / "peft-1.0.dist-info" / "METADATA").write_bytes(b"\xff\xfe\x00")
    found = examine()["peft"]
    assert (found.status, found.value) == (BROKEN, "its metadata is damaged")
    assert found.fix == "pip install --force-reinstall --no-deps peft"


@pytest.mark.usefixtures("no_gpu")
def test_what_is_missing_comes_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "version", lambda name: None)
    monkeypatch.setattr(runtimes, "distributions", lambda name: ())
    found = examine()
    fixes = {f.topic: f.fix for f in found.findings if f.status == MISSING and f.topic != "gpu"}
    assert fixes["torch"] == "in a clone of kilodelta: pip install '.[torch]'"
    assert fixes["transformers"] == "in a clone of kilodelta: pip install '.[hf]'"
    assert fixes["onnxruntime"] == "in a clone of kilodelta: pip install '.[cpu]'"
    assert fixes["peft"] == "in a clone of kilodelta: pip install '.[peft]'"
    assert found["triton"].status == OK  # no use without a GPU


@pytest.mark.usefixtures("gpu")
def test_a_gpu_and_its_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "version", lambda name: "1.0")
    monkeypatch.setattr(doctor, "torch_cuda", lambda: "13.0")
    found = examine()
    assert found["gpu"].value.startswith("Fake RTX (sm89, 12 GB); driver ")
    assert found["gpu"].value.endswith(" for CUDA up to 12.4")
    torch = found["torch"]
    assert (torch.status, torch.fix) == (CONFLICT, "update the driver to one for CUDA 13.0")
    monkeypatch.setattr(doctor, "torch_cuda", lambda: None)
    assert examine()["torch"].fix.startswith("there is a GPU: install a CUDA build")
    monkeypatch.setattr(doctor, "torch_cuda", lambda: "12.8")
    assert examine()["torch"].status == OK


def test_the_cuda_of_torch_is_read_not_imported(install: Install, tmp_path: Path) -> None:
    install("torch", "9.9", "torch", "raise RuntimeError")
    version = tmp_path / "torch" / "version.py"
    version.write_text("from typing import Optional\ncuda: Optional[str] = '13.0'\n")
    assert packages.torch_cuda() == "13.0"
    version.write_text("cuda = None\n")
    assert packages.torch_cuda() is None
    version.write_text("cuda = (\n")
    assert packages.torch_cuda() is None
    version.unlink()
    assert packages.torch_cuda() is None


@pytest.mark.usefixtures("no_gpu")
def test_tensorrt_of_both_flavours(install: Install) -> None:
    install("tensorrt", "11.3", "tensorrt", "__version__ = '11.3'")
    install("tensorrt-rtx-cu13", "1.7", "tensorrt_rtx", "raise ImportError('libtensorrt_rtx.so')")
    found = examine()
    assert found["tensorrt"].value == "11.3, needs a GPU to build and run engines"
    assert found["tensorrt_rtx"].status == BROKEN
    assert "libtensorrt_rtx.so" in found["tensorrt_rtx"].value


@pytest.mark.parametrize(
    ("known", "value", "fix"),
    [
        ("SM80 SM89", "1.7, builds engines for sm80, sm89; runs them here", ""),
        ("SM80", "1.7, builds engines for sm80, not for this machine's sm89", "for sm89 use "),
    ],
)
@pytest.mark.usefixtures("gpu")
def test_rtx_says_which_gpus_it_builds_for(
    install: Install, known: str, value: str, fix: str
) -> None:
    source = f"import enum\n__version__ = '1.7'\n{RTX_NAMES.format(known)}\n"
    install("tensorrt-rtx-cu13", "1.7", "tensorrt_rtx", source)
    found = examine()["tensorrt_rtx"]
    assert (found.status, found.value) == (OK, value)
    assert found.fix.startswith(fix)
    assert bool(found.fix) == bool(fix)


RTX_NAMES = "ComputeCapability = enum.Enum('ComputeCapability', 'NONE CURRENT {}')"


def test_the_table_has_a_row_for_each_finding() -> None:
    found = examine()
    [table] = found.tables()
    assert [row[0] for row in table.rows] == [finding.topic for finding in found.findings]
    assert {len(row) for row in table.rows} == {len(table.columns)}


def test_a_probe_may_print_what_it_likes() -> None:
    assert packages.ask("print('a'); print('b')").lines == ("a", "b")
    assert packages.ask("raise SystemExit(3)").error == "exit code 3"
    assert packages.ask("import os; os.write(1, bytes([255]))").lines == ("\ufffd",)
