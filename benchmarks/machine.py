"""What a benchmark prints about the machine that it ran on, and how it times."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PACKAGES = ("kilodelta", "numpy", "numba", "torch", "peft", "transformers", "onnxruntime")
UNITS = (
    "avx2",
    "avx512f",
    "avx512_bf16",
    "avx512_vnni",
    "avx_vnni",
    "amx_bf16",
    "amx_int8",
    "sha_ni",
    "asimddp",
    "i8mm",
)


def describe() -> dict[str, str]:
    """Processor, cores, its integer units, and the versions of the packages compared."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = next(
        (line.split(":")[1].strip() for line in text.splitlines() if "model name" in line), ""
    )
    flags = set(text.split())
    return {
        "processor": model or platform.processor() or platform.machine(),
        "cores": str(os.cpu_count()),
        "units": " ".join(unit for unit in UNITS if unit in flags),
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "versions": ", ".join(f"{n} {v}" for n in PACKAGES if (v := _version(n))),
        "date": time.strftime("%Y-%m-%d"),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


@contextmanager
def peak_memory() -> Iterator[Callable[[], int]]:
    """A function that tells the largest anonymous memory of this process so far, in bytes;
    sampled every 2 ms while the block runs."""
    largest, done = [_anonymous()], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            largest[0] = max(largest[0], _anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield lambda: largest[0]
    finally:
        done.set()
        watcher.join()


def _anonymous() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
