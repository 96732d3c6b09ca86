"""Running every artefact in every runner that fits, on the same real inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from torch import nn

from kilodelta.errors import InputError, KiloDeltaError
from kilodelta.export.manifest.artefacts import Artefact, Profile, Shape
from kilodelta.models import outputs, read_inputs
from kilodelta.progress import Event, Progress
from kilodelta.verify.options import Options, Subject
from kilodelta.verify.parity.agreement import agreement
from kilodelta.verify.parity.bisect import first_departure
from kilodelta.verify.parity.cases import Case, cases
from kilodelta.verify.parity.models import (
    LABELS,
    Labelled,
    Pair,
    embed_labels,
    open_pair,
    open_tuned,
)
from kilodelta.verify.parity.parity import Truth, judge
from kilodelta.verify.parity.report import Report
from kilodelta.verify.parity.result import Agreement, Departure, Result
from kilodelta.verify.runners.onnx_runner import OnnxRunner
from kilodelta.verify.runners.runner import Batch, Runner
from kilodelta.verify.runners.tensorrt_runner import TensorrtRunner
from kilodelta.verify.runners.torch_runner import TorchRunner

MERGED = "merged model"
DEVICES = ("cpu", "cuda")
ROWS = 32
"""Rows of a batch where no profile says how many."""

Key: TypeAlias = tuple[tuple[tuple[str, tuple[Shape, ...]], ...], tuple[str, ...]]


def compare_outputs(subject: Subject, options: Options, progress: Progress) -> Report:
    """Run everything and judge it.

    Raises:
        InputError: the inputs cannot be read, or are not what the artefacts take.
        ProofError: base and merged model give the same outputs on these inputs.
    """
    pair = open_pair(subject, options, progress)
    exported = () if subject.export is None else subject.export.artefacts
    batches = _batches(pair, options, _most_rows(exported))
    bench = _Bench(pair, batches[0], options, progress)
    results = bench.torch(exported)
    for artefact in exported:
        assert subject.folder is not None  # it is where the artefacts were found
        results += bench.artefact(subject.folder, artefact)
    return Report(
        results=tuple(results),
        agreement=() if options.against is None else _agree(pair, batches, options, progress),
        required=options.require,
        inputs=str(options.inputs),
        rows=sum(len(next(iter(batch.values()))) for batch in batches),
    )


def _most_rows(exported: Sequence[Artefact]) -> int:
    shapes = (points[-1] for artefact in exported for points in artefact.profile.values())
    return max((shape[0] for shape in shapes if shape), default=ROWS)


def _batches(pair: Pair, options: Options, rows: int) -> list[Batch]:
    """All inputs where agreement is asked for, else as many as the largest case takes."""
    limit = options.limit if options.against else min(options.limit or rows, rows)
    found = read_inputs(
        str(options.inputs),
        pair.merged,
        limit=limit,
        batch_size=rows,
        field=options.field,
        max_length=options.max_length,
    )
    return [{name: tensor.numpy() for name, tensor in batch.items()} for batch in found]


class _Bench:
    """Judges runners; artefacts with the same profile share a reference."""

    def __init__(self, pair: Pair, batch: Batch, options: Options, progress: Progress) -> None:
        self._pair, self._batch, self._options = pair, batch, options
        self._progress = progress
        self._truths: dict[Key, Truth] = {}
        self._done = 0

    def torch(self, exported: Sequence[Artefact]) -> list[Result]:
        """Plain torch on the merged model, at the first artefact's shapes."""
        profile = exported[0].profile if exported else _own_profile(self._batch)
        truth = self._truth(profile, _outputs(self._pair, self._batch))
        view = self._pair.merged.view()
        return [
            self._judge(
                TorchRunner(view, truth.outputs, precision="float32", device=device),
                truth,
                MERGED,
                "float32",
            )
            for device in DEVICES
        ]

    def artefact(self, folder: Path, artefact: Artefact) -> list[Result]:
        """One artefact in all of its runners."""
        truth = self._truth(artefact.profile, tuple(port.name for port in artefact.outputs))
        path, precision = folder / artefact.file, precision_of(artefact)
        return [
            self._judge(runner, truth, artefact.file, precision, path)
            for runner in runners_of(path, artefact)
        ]

    def _judge(
        self,
        runner: Runner,
        truth: Truth,
        artefact: str,
        precision: str,
        path: Path | None = None,
    ) -> Result:
        self._done += 1
        detail = {"runner": runner.name, "artefact": artefact}
        self._progress(Event(stage="run", done=self._done, total=0, unit="runs", detail=detail))

        def locate(case: Case) -> Departure | None:
            return None if path is None else self._departure(path, case, precision)

        return judge(runner, truth, artefact=artefact, precision=precision, locate=locate)

    def _departure(self, path: Path, case: Case, precision: str) -> Departure | None:
        """Where an ONNX file first departs; a help for repair, so its own failure is no matter."""
        if path.suffix != ".onnx":
            return None
        try:
            return first_departure(
                path,
                self._pair.merged.module,
                case.batch,
                precision=precision,
                device=self._options.device,
                names=self._pair.merged.names,
            )
        except KiloDeltaError:
            return None

    def _truth(self, profile: Profile, names: tuple[str, ...]) -> Truth:
        key = tuple((name, tuple(points)) for name, points in profile.items()), names
        if key not in self._truths:
            _require_inputs(profile, self._batch)
            self._truths[key] = Truth(
                self._pair.merged.view(),
                self._pair.base.view(),
                outputs=names,
                scores=[name for name in names if "logits" in name],
                cases=cases(self._batch, profile),
                device=self._options.device,
                progress=self._progress,
            )
        return self._truths[key]


def runners_of(path: Path, artefact: Artefact) -> list[Runner]:
    """Everything that could run an artefact, whether it is there or not."""
    if artefact.engine is None:
        return [OnnxRunner(path, device=device) for device in DEVICES]
    engine = artefact.engine
    return [TensorrtRunner(path, flavour=engine.flavour, capabilities=engine.capabilities)]


def precision_of(artefact: Artefact) -> str:
    """What an artefact is judged as: TF32 has float16's 11 significant bits."""
    tf32 = artefact.engine is not None and artefact.engine.tf32
    return "float16" if tf32 and artefact.dtype == "float32" else artefact.dtype


def _own_profile(batch: Batch) -> Mapping[str, tuple[Shape, Shape, Shape]]:
    """The shapes of the inputs themselves, and those of a single row."""
    return {
        name: ((1, *array.shape[1:]), array.shape, array.shape) for name, array in batch.items()
    }


def _outputs(pair: Pair, batch: Batch) -> tuple[str, ...]:
    row = {name: torch.from_numpy(array[:1]) for name, array in batch.items()}
    with torch.inference_mode():
        return tuple(outputs(pair.merged, row))


def _require_inputs(profile: Profile, batch: Batch) -> None:
    absent = [name for name in profile if name not in batch]
    if absent:
        raise InputError(
            f"the artefacts take {', '.join(absent)}, which the inputs do not hold",
            fix=f"give inputs with {', '.join(profile)}",
        )


def _agree(
    pair: Pair, batches: Sequence[Batch], options: Options, progress: Progress
) -> tuple[Agreement, ...]:
    names = _outputs(pair, batches[0])
    views: list[nn.Module] = [m.view() for m in (open_tuned(options), pair.merged, pair.base)]
    if options.labels is not None:
        labels = embed_labels(pair, options)
        views = [Labelled(view, labels) for view in views]
        names = (*names, LABELS)
    return agreement(
        *views,
        outputs=names,
        scores=[name for name in names if "logits" in name or name == LABELS],
        batches=batches,
        device=options.device,
        progress=progress,
    )
