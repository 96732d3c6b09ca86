"""Part two of a GPU's proof: exported artefacts compute what they should, and how fast."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from kilodelta.errors import ExportError, KiloDeltaError
from kilodelta.export.adapter.factors import Factors, expand
from kilodelta.export.adapter.graph import with_adapter
from kilodelta.export.manifest.facts import FLAVOURS, Artefact, ExportManifest
from kilodelta.export.onnx.make import export_template
from kilodelta.export.onnx.save import save
from kilodelta.export.onnx.template import fill_template
from kilodelta.export.options import short
from kilodelta.export.pipeline import export
from kilodelta.export.tensorrt import build, cuda
from kilodelta.export.tensorrt.flavour import choose
from kilodelta.export.tensorrt.refit import RefitEngine
from kilodelta.format.file import load
from kilodelta.merging.gpu.choose import device_named
from kilodelta.models import open_model
from kilodelta.verify.gpu.latency import latencies, on_torch
from kilodelta.verify.gpu.model import LAYERS, RANK, Models, make
from kilodelta.verify.gpu.part import MEASURED, PartRow, Setting, guarded
from kilodelta.verify.parity.bench import MERGED
from kilodelta.verify.parity.cases import cases
from kilodelta.verify.parity.judge import judge
from kilodelta.verify.parity.result import Result
from kilodelta.verify.runners.onnx_runner import OnnxRunner
from kilodelta.verify.runners.request import Request
from kilodelta.verify.runners.runner import Arrays, Batch, UnavailableError
from kilodelta.verify.runners.tensorrt_runner import TensorrtRunner
from kilodelta.verify.runners.torch_runner import TorchRunner
from kilodelta.verify.verification import verify

Runs = OnnxRunner | TensorrtRunner


def parity(setting: Setting) -> Iterator[PartRow]:
    """Export an encoder and run it in torch, ONNX Runtime and both flavours of TensorRT.

    It is run whole, as an adapter graph, and in TensorRT before and after a refit.
    """
    device = device_named(setting.device)
    dtypes = ("float32", "float16") if device.type == "cuda" else ("float32",)
    models = make(setting.folder, small=setting.small)
    bench = _Bench(models=models, device=device, folder=setting.folder, dtypes=dtypes)
    yield from guarded("onnx", bench.onnx())
    for dtype in dtypes:
        yield from guarded(f"onnx, adapter {dtype}", bench.adapter(dtype, None))
    for flavour in FLAVOURS:
        yield from guarded(flavour, bench.engines(flavour))


@dataclass(frozen=True, kw_only=True)
class _Maker:
    """A TensorRT that builds for this machine's GPU."""

    trt: Any
    flavour: str
    capability: str

    def runner(self, path: Path) -> TensorrtRunner:
        return TensorrtRunner(path, flavour=self.flavour, capabilities=(self.capability,))


@dataclass(frozen=True, kw_only=True)
class _Bench:
    models: Models
    device: torch.device
    folder: Path
    dtypes: tuple[str, ...]

    def onnx(self) -> Iterator[PartRow]:
        """Judge and time ONNX files in ONNX Runtime, and time torch."""
        out, manifest = self._export("onnx", {"dtype": self._short})
        yield from self._verified("onnx", out)
        for artefact in manifest.artefacts:
            yield from self._torch(artefact)
            runner = OnnxRunner(out / artefact.file, device=self.device.type)
            yield from self._timed(artefact.file, runner, artefact)

    def engines(self, flavour: str) -> Iterator[PartRow]:
        """Judge and time engines with fixed weights, refittable ones, and those of adapter graphs.

        Raises:
            UnavailableError: there is no GPU that this flavour builds for.
            MissingPackageError: the flavour is not installed.
        """
        maker = _maker(flavour, self.dtypes)
        options = {"tensorrt": (maker.capability,), "flavour": flavour, "dtype": self._short}
        yield from guarded(flavour, self._fixed(maker, options))
        refittable = {**options, "refittable": True}
        yield from guarded(f"{flavour}, refittable", self._refitted(maker, refittable))
        for dtype in self.dtypes:
            yield from guarded(f"{flavour}, adapter {dtype}", self.adapter(dtype, maker))

    def _fixed(self, maker: _Maker, options: Mapping[str, Any]) -> Iterator[PartRow]:
        out, manifest = self._export(maker.flavour, options)
        yield from self._verified(maker.flavour, out)
        for artefact in manifest.artefacts:
            yield from self._timed(artefact.file, maker.runner(out / artefact.file), artefact)

    def _refitted(self, maker: _Maker, options: Mapping[str, Any]) -> Iterator[PartRow]:
        """Judge a plan as it was built; then refit it with another fine-tune, save, load, judge."""
        what = f"{maker.flavour}, refittable"
        out, manifest = self._export(f"{maker.flavour}-refittable", options)
        yield from self._verified(what, out)
        for artefact in manifest.artefacts:
            name, path = f"{artefact.file}, {what}", out / artefact.file
            yield from self._timed(name, maker.runner(path), artefact)
            saved = path.with_name(f"refitted-{artefact.file}")
            yield from self._refit(name, path, maker.flavour, saved)
            yield from self._judged(
                f"{name}, refitted and saved", maker.runner(saved), artefact, fine_tune=1
            )

    def _refit(self, name: str, path: Path, flavour: str, saved: Path) -> Iterator[PartRow]:
        engine = RefitEngine(path, self.models.base, flavour=flavour)
        began = perf_counter()
        done = engine.refit(self.models.deltas[1])
        seconds = perf_counter() - began
        engine.save(saved)
        text = f"{seconds:.2f} s for {len(done.weights)} weights, the delta proved"
        yield PartRow(
            what=f"{name}, refit",
            found="; ".join((text, *done.warnings)),
            status=MEASURED,
            numbers={"seconds": seconds, "weights": len(done.weights)},
        )

    def adapter(self, dtype: str, maker: _Maker | None) -> Iterator[PartRow]:
        """Judge and time a graph of the base's weights that takes a fine-tune's factors as inputs.

        Args:
            dtype: of the graph.
            maker: builds an engine of it; None runs it in ONNX Runtime.
        """
        models, loaded = self.models, open_model(str(self.models.base))
        template = export_template(loaded, dtype=dtype)
        wide, layout = with_adapter(
            template, models.base, include=LAYERS.include, exclude=LAYERS.exclude, rank=RANK
        )
        path = self.folder / f"adapter-{dtype}.onnx"
        save(fill_template(wide, models.base), path)
        runner: Runs = OnnxRunner(path, device=self.device.type)
        if maker is not None:
            engine = self.folder / f"adapter-{dtype}-{maker.flavour}.engine"
            profile = wide.profile()
            built = (maker.capability,)
            build.build(maker.trt, path, engine, capabilities=built, profile=profile)
            runner = maker.runner(engine)
        bound = _WithFactors(runner=runner, factors=expand(load(models.deltas[0]), layout))
        names = tuple(port.name for port in template.outputs)
        shapes = template.profile()
        against = models.reference(0, shapes, names, self.device.type)
        yield _row("", judge(bound, against, artefact=f"adapter graph {dtype}", precision=dtype))
        yield from latencies(f"adapter graph {dtype} in {bound.name}", bound.request, against.cases)

    def _export(self, name: str, options: Mapping[str, Any]) -> tuple[Path, ExportManifest]:
        out = self.folder / f"out-{name}"
        return out, export(self.models.base, self.models.deltas[0], out, **options).manifest

    @property
    def _short(self) -> list[str]:
        """The precisions as options write them."""
        return [short(dtype) for dtype in self.dtypes]

    def _verified(self, name: str, out: Path) -> Iterator[PartRow]:
        """Verify an export as `kilodelta verify` does."""
        verification = verify(
            self.models.base,
            self.models.deltas[0],
            [out],
            inputs=self.models.inputs,
            device=self.device.type,
        )
        assert verification.report is not None  # inputs were given
        for result in verification.report.results:
            # The merged model in torch is the same for every export: one row of it is enough.
            if result.artefact != MERGED or name == "onnx":
                yield _row(name, result)

    def _torch(self, artefact: Artefact) -> Iterator[PartRow]:
        view, outputs = self.models.pair(0).merged.view(), _names(artefact)
        runner = TorchRunner(view, outputs, precision=artefact.dtype, device=self.device.type)
        module = runner.module

        def ask(batch: Batch) -> AbstractContextManager[Request]:
            return on_torch(module, batch, precision=artefact.dtype, device=self.device)

        name = f"merged model in {runner.name}, {artefact.dtype}"
        yield from latencies(name, ask, cases(self.models.batch, artefact.profile))

    def _judged(
        self, name: str, runner: Runs, artefact: Artefact, *, fine_tune: int
    ) -> Iterator[PartRow]:
        against = self.models.reference(
            fine_tune, artefact.profile, _names(artefact), self.device.type
        )
        yield _row("", judge(runner, against, artefact=name, precision=artefact.dtype))
        yield from self._timed(name, runner, artefact)

    def _timed(self, name: str, runner: Runs, artefact: Artefact) -> Iterator[PartRow]:
        shapes = cases(self.models.batch, artefact.profile)
        yield from latencies(f"{name} in {runner.name}", runner.request, shapes)


def _maker(flavour: str, dtypes: tuple[str, ...]) -> _Maker:
    here = cuda.present()
    if here is None:
        raise UnavailableError("no NVIDIA GPU or driver", fix="run it on a machine with one")
    try:
        return _Maker(trt=choose(flavour, (here,), dtypes), flavour=flavour, capability=here)
    except ExportError as error:  # it builds for other GPUs, or in other precisions
        raise UnavailableError(error.what, fix=error.fix) from None


@dataclass(frozen=True, kw_only=True)
class _WithFactors:
    """A runner that gets a fine-tune's factors beside every batch."""

    runner: Runs
    factors: Factors

    @property
    def name(self) -> str:
        return self.runner.name

    def available(self) -> KiloDeltaError | None:
        return self.runner.available()

    def run(self, batch: Batch) -> Arrays:
        return self.runner.run({**batch, **self.factors})

    def request(self, batch: Batch) -> AbstractContextManager[Request]:
        return self.runner.request({**batch, **self.factors})


def _names(artefact: Artefact) -> tuple[str, ...]:
    return tuple(port.name for port in artefact.outputs)


def _row(prefix: str, result: Result) -> PartRow:
    what = f"{result.artefact} in {result.runner}, {result.precision}"
    worst = max((check.error.relative_l2 for check in result.checks), default=0.0)
    text = f"relative L2 up to {worst:.2g} in {len(result.checks)} checks"
    reasons = result.reasons()
    return PartRow(
        what=f"{prefix}: {what}" if prefix else what,
        found="; ".join(reasons) if reasons else text,
        status=result.status,
        numbers={"relative_l2": worst, "checks": len(result.checks)} if result.checks else {},
    )
