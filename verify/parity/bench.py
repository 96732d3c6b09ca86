"""Run every artefact in every runner that fits, on the same real inputs, and judge it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from torch import nn

from kilodelta.errors import InputError
from kilodelta.export.manifest.facts import Artefact, Profile, Shape
from kilodelta.models import outputs, read_inputs
from kilodelta.progress import Event, Progress
from kilodelta.verify.options import Subject, VerifyOptions
from kilodelta.verify.parity.agreement import agreement
from kilodelta.verify.parity.bisect import first_departure
from kilodelta.verify.parity.cases import Case, cases
from kilodelta.verify.parity.halves import Halves, HalvesRunner, joined
from kilodelta.verify.parity.judge import judge
from kilodelta.verify.parity.models import (
    LABELS,
    Labelled,
    ModelPair,
    embed_labels,
    open_pair,
    open_tuned,
)
from kilodelta.verify.parity.plan import plan
from kilodelta.verify.parity.reference import Reference
from kilodelta.verify.parity.report import Report
from kilodelta.verify.parity.result import Agreement, Departure, Result
from kilodelta.verify.parity.traits import Trial
from kilodelta.verify.runners.onnx_runner import OnnxRunner
from kilodelta.verify.runners.runner import Batch, Runner
from kilodelta.verify.runners.tensorrt_runner import TensorrtRunner
from kilodelta.verify.runners.torch_runner import TorchRunner

MERGED = "merged model"
DEVICES = ("cpu", "cuda")
ROWS = 32
"""Rows of a batch where no profile says how many."""

_Key: TypeAlias = tuple[tuple[tuple[str, tuple[Shape, ...]], ...], tuple[str, ...]]


def compare_outputs(subject: Subject, options: VerifyOptions, progress: Progress) -> Report:
    """Run everything and judge it.

    Everything that can be wrong with the options is found before any artefact is run.

    Args:
        subject: what is verified; its digests are proved.
        options: how; `options.inputs` is given.
        progress: called as work goes on.

    Raises:
        InputError: the inputs cannot be read, or are not what model and artefacts take.
        ProofError: base and merged model give the same outputs on these inputs.
    """
    pair = open_pair(subject, options, progress)
    labels = None if options.labels is None else embed_labels(pair, options)
    tuned = None if options.against is None else open_tuned(options).view()
    exported = () if subject.export is None else joined(subject.export.artefacts)
    batches = _batches(pair, options, _most_rows(exported))
    for artefact in exported:
        _require_inputs(artefact, batches[0])
    agreements = () if tuned is None else _agree(tuned, pair, labels, batches, options, progress)
    bench = Bench(pair, batches[0], device=options.device, progress=progress)
    results = bench.torch(exported)
    for artefact in exported:
        assert subject.folder is not None  # it is where the artefacts were found
        results += bench.artefact(subject.folder, artefact)
    return Report(
        results=tuple(results),
        agreement=agreements,
        required=options.require,
        inputs=str(options.inputs),
        rows=sum(len(next(iter(batch.values()))) for batch in batches),
        notes=bench.notes,
    )


def _most_rows(exported: Sequence[Artefact]) -> int:
    shapes = (points[-1] for artefact in exported for points in artefact.profile.values())
    return max((shape[0] for shape in shapes if shape), default=ROWS)


def _batches(pair: ModelPair, options: VerifyOptions, rows: int) -> list[Batch]:
    """Take all inputs where agreement is asked for, else as many as the largest case needs."""
    limit = options.limit if options.against else min(options.limit or rows, rows)
    batches = read_inputs(
        str(options.inputs),
        pair.merged,
        limit=limit,
        batch_size=rows,
        field=options.field,
        max_length=options.max_length,
    )
    return [{name: tensor.numpy() for name, tensor in batch.items()} for batch in batches]


def _require_inputs(artefact: Artefact, batch: Batch) -> None:
    """Check that the inputs hold what an artefact takes, in its kind of number."""
    absent = [name for name in artefact.profile if name not in batch]
    if absent:
        raise InputError(
            f"the artefacts take {', '.join(absent)}, which the inputs do not hold",
            fix=f"give inputs with {', '.join(artefact.profile)}",
        )
    for port in artefact.inputs:
        array = batch.get(port.name)
        if array is None:
            continue
        given, wanted = array.dtype.kind == "f", "float" in port.dtype
        if given != wanted:
            raise InputError(
                f"the inputs hold {port.name} as {array.dtype}, {artefact.file} takes {port.dtype}",
                fix=f"give {port.name} as "
                f"{'floats, scaled as in training' if wanted else port.dtype}",
            )
        if array.ndim != len(port.shape):
            raise InputError(
                f"the inputs hold {port.name} of shape {array.shape}, {artefact.file} takes "
                f"({', '.join(map(str, port.shape))})",
                fix=f"give {port.name} with {len(port.shape)} axes, the first one rows",
            )


def _agree(
    tuned: nn.Module,
    pair: ModelPair,
    labels: torch.Tensor | None,
    batches: Sequence[Batch],
    options: VerifyOptions,
    progress: Progress,
) -> tuple[Agreement, ...]:
    names = output_names(pair, batches[0])
    views: dict[str, nn.Module] = {
        "tuned": tuned, "merged": pair.merged.view(), "base": pair.base.view()
    }  # fmt: skip
    if labels is not None:
        views = {name: Labelled(view, labels) for name, view in views.items()}
        names = (*names, LABELS)
    return agreement(
        views,
        outputs=names,
        scores=[name for name in names if is_score(name) or name == LABELS],
        batches=batches,
        device=options.device,
        progress=progress,
    )


class Bench:
    """Judges runners; artefacts with the same profile and outputs share a reference.

    Args:
        pair: merged model and base.
        batch: real inputs.
        device: where torch computes the reference, "cpu" or "cuda".
        progress: called as work goes on.
    """

    def __init__(self, pair: ModelPair, batch: Batch, *, device: str, progress: Progress) -> None:
        self._pair, self._batch, self._device = pair, batch, device
        self._progress = progress
        self._references: dict[_Key, Reference] = {}
        self._notes: dict[str, None] = {}
        self._done = 0

    @property
    def notes(self) -> tuple[str, ...]:
        """What was not compared as the profiles say, each sentence once."""
        return tuple(self._notes)

    def torch(self, exported: Sequence[Artefact]) -> list[Result]:
        """Judge plain torch on the merged model, at the first artefact's shapes."""
        profile = exported[0].profile if exported else _own_profile(self._batch)
        reference = self._reference(profile, output_names(self._pair, self._batch))
        view = self._pair.merged.view()
        return [
            self._judge(
                TorchRunner(view, reference.outputs, precision="float32", device=device),
                reference,
                MERGED,
                "float32",
            )
            for device in DEVICES
        ]

    def artefact(self, folder: Path, artefact: Artefact) -> list[Result]:
        """Judge one artefact in all of its runners."""
        names = tuple(port.name for port in artefact.outputs)
        reference = self._reference(artefact.profile, names)
        path, precision = folder / artefact.file, precision_of(artefact)
        return [
            self._judge(runner, reference, artefact.file, precision, path)
            for runner in runners_of(folder, artefact)
        ]

    def _judge(
        self,
        runner: Runner,
        reference: Reference,
        artefact: str,
        precision: str,
        path: Path | None = None,
    ) -> Result:
        self._done += 1
        detail = {"runner": runner.name, "artefact": artefact}
        self._progress(Event(stage="run", done=self._done, total=0, unit="runs", detail=detail))

        def locate(case: Case) -> Departure | None:
            return None if path is None else self._departure(path, case, precision)

        return judge(runner, reference, artefact=artefact, precision=precision, locate=locate)

    def _departure(self, path: Path, case: Case, precision: str) -> Departure | None:
        """Locate the first layer that is off, for the report only."""
        if path.suffix != ".onnx" or not path.is_file():  # an engine, or two files
            return None
        try:
            return first_departure(
                path,
                self._pair.merged.module,
                case.batch,
                precision=precision,
                device=self._device,
                names=self._pair.merged.names,
            )
        except Exception:  # the failure itself is reported; its place is a help, not a result
            return None

    def _reference(self, profile: Profile, names: tuple[str, ...]) -> Reference:
        key = tuple((name, tuple(points)) for name, points in profile.items()), names
        if key not in self._references:
            view = self._pair.merged.view()
            chosen = plan(view, names, self._batch, profile, progress=self._progress)
            self._notes.update(dict.fromkeys(chosen.notes))
            self._references[key] = Reference(
                view,
                self._pair.base.view(),
                outputs=names,
                scores=[name for name in names if is_score(name)],
                cases=cases(
                    self._batch,
                    chosen.profile,
                    left=not chosen.whole and Trial(view, names, self._batch).reads_left_to_right(),
                    whole=chosen.whole,
                ),
                device=self._device,
                rows=chosen.rows,
                progress=self._progress,
            )
            if undefined := self._references[key].undefined:
                self._notes[
                    f"not compared with padding on the left: {', '.join(sorted(undefined))}, which "
                    "the model itself takes from padded positions there; pad its inputs on the "
                    "right"
                ] = None
        return self._references[key]


def runners_of(folder: Path, artefact: Artefact) -> list[Runner]:
    """Return everything that could run an artefact of a folder, whether it works here or not."""
    if isinstance(artefact, Halves):
        pairs = zip(
            runners_of(folder, artefact.encoder), runners_of(folder, artefact.decoder), strict=True
        )
        return [HalvesRunner(encoder, decoder) for encoder, decoder in pairs]
    path = folder / artefact.file
    if artefact.engine is None:
        return [OnnxRunner(path, device=device) for device in DEVICES]
    engine = artefact.engine
    return [TensorrtRunner(path, flavour=engine.flavour, capabilities=engine.capabilities)]


def precision_of(artefact: Artefact) -> str:
    """Return the precision to judge an artefact by: TF32 has float16's 11 significant bits."""
    tf32 = artefact.engine is not None and artefact.engine.tf32
    return "float16" if tf32 and artefact.dtype == "float32" else artefact.dtype


def is_score(name: str) -> bool:
    """Return whether an output holds class scores along its last axis, by its name."""
    return "logits" in name


def output_names(pair: ModelPair, batch: Batch) -> tuple[str, ...]:
    """Return the names of everything that the merged model puts out for a row of the batch."""
    row = {name: torch.from_numpy(array[:1]) for name, array in batch.items()}
    with torch.inference_mode():
        return tuple(outputs(pair.merged, row))


def _own_profile(batch: Batch) -> Mapping[str, tuple[Shape, Shape, Shape]]:
    """Return the shapes of the inputs themselves, and those of a single row."""
    return {
        name: ((1, *array.shape[1:]), array.shape, array.shape) for name, array in batch.items()
    }
