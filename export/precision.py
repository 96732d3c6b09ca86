"""Make one model in one precision: ONNX files, and engines."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kilodelta.errors import InputError
from kilodelta.export.decoder.genai import write_genai
from kilodelta.export.decoder.template import cached_template
from kilodelta.export.manifest.artefacts import file_fact
from kilodelta.export.manifest.facts import Artefact, EngineFacts
from kilodelta.export.onnx.make import export_template
from kilodelta.export.onnx.save import save
from kilodelta.export.onnx.template import Template, fill_template
from kilodelta.export.options import Options, short
from kilodelta.export.quantised.graph import put_codes, settled
from kilodelta.export.quantised.proof import prove_codes
from kilodelta.export.seq2seq.genai import why_no_genai, write_whisper_config
from kilodelta.export.seq2seq.halves import ENCODER_FILE, half_templates
from kilodelta.export.tensorrt import build
from kilodelta.files import staging
from kilodelta.grid.model import QuantisedModel
from kilodelta.models import Batch, LoadedModel
from kilodelta.models.generation.seq2seq import is_seq2seq
from kilodelta.progress import Event, Progress

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Maker:
    """Where artefacts go, and how they are made.

    Attributes:
        options: what was asked for.
        trt: a TensorRT module, or None where no engine is wanted.
        refit: tensors that an engine may get new values for later.
        stage: the folder to write into.
        progress: called while work goes on.
        merged: the model merged in the grid of a quantised base, whose codes graphs get.
        seconds: how long each part took, filled as work goes on.
        notes: sentences on what is fixed, filled as work goes on.
        dropped: ONNX files that engines were built from alone, filled as work goes on.
    """

    options: Options
    trt: Any
    refit: frozenset[str]
    stage: Path
    progress: Progress
    merged: QuantisedModel | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)

    def make(
        self, loaded: LoadedModel, batch: Batch | None, weights: Path, dtype: str
    ) -> list[Artefact]:
        """Trace the model, fill it with weights, write it, and build its engine.

        Args:
            loaded: the merged model.
            batch: inputs to trace with, or None to make them up.
            weights: the merged checkpoint.
            dtype: "float32", "float16" or "bfloat16".

        Raises:
            ExportError: the model cannot be exported, or an engine not be built.
            InputError: a profile does not fit the model.
        """
        templates = self._trace(loaded, batch, dtype)
        names = {key: f"{key}.{short(dtype)}.onnx" for key in templates}
        artefacts = []
        for key, template in templates.items():
            made = self._made(template, weights, names[key])
            if key == next(reversed(templates)):  # the decoder, which the configuration is of
                beside = self._beside(loaded, templates, names, weights)
                made[0] = replace(made[0], files=(*made[0].files, *map(file_fact, beside)))
            artefacts += made
        return artefacts

    def _beside(
        self,
        loaded: LoadedModel,
        templates: Mapping[str, Template],
        names: Mapping[str, str],
        weights: Path,
    ) -> tuple[Path, ...]:
        """Write what ONNX Runtime GenAI reads beside graphs with a cache, where it runs them."""
        if not (self.options.kv_cache and self.options.onnx):
            return ()
        if not is_seq2seq(loaded):
            ((key, template),) = templates.items()
            return write_genai(self.stage / names[key], template, loaded, weights)
        reason = why_no_genai(loaded, templates[ENCODER_FILE].inputs)
        if reason is not None:
            self.notes.append(reason)
            return ()
        return write_whisper_config(templates, names, loaded, weights, self.stage)

    def _made(self, template: Template, weights: Path, name: str) -> list[Artefact]:
        """Write one graph with its weights, and build its engine."""
        self.notes.extend(template.notes)
        if self.options.onnx:
            onnx = self._write(template, weights, self.stage / name)
            engines = [self._build(template, self.stage / name, onnx)] if self.trt else []
            return [onnx, *engines]
        self.dropped.append(name)
        with staging.scratch(weights) as folder:  # beside the weights there is room for a model
            onnx = self._write(template, weights, folder / name)
            return [self._build(template, folder / name, onnx)]

    def _trace(self, loaded: LoadedModel, batch: Batch | None, dtype: str) -> dict[str, Template]:
        """Make the graphs, by what the names of their files begin with."""
        stage = f"trace {short(dtype)}"
        self.progress(Event(stage=stage, done=0, total=1, unit="models"))
        with self.timed(stage):
            graphs = self._graphs(loaded, batch, dtype)
        self.progress(Event(stage=stage, done=1, total=1, unit="models"))
        return graphs

    def _graphs(self, loaded: LoadedModel, batch: Batch | None, dtype: str) -> dict[str, Template]:
        sizes, cached = self.options.sizes, self.options.kv_cache
        if batch is None and is_seq2seq(loaded):
            self._check_halves(loaded)
            return half_templates(loaded, cached=cached, dtype=dtype, sizes=sizes)
        if cached:
            return {"model": cached_template(loaded, dtype=dtype, sizes=sizes)}
        return {"model": export_template(loaded, batch, dtype=dtype, sizes=sizes)}

    def _check_halves(self, loaded: LoadedModel) -> None:
        """Refuse what an encoder and a decoder apart cannot be combined with."""
        what = f"{type(loaded.module).__name__} is exported as an encoder and a decoder"
        if self.options.outputs:
            raise InputError(
                f"{what}, whose outputs cannot be chosen",
                fix="leave --outputs out, or give --inputs: the whole model is then one graph",
            )
        if self.options.served:
            raise InputError(
                f"{what}, and Triton would serve each alone",
                fix="leave --triton out, or give --inputs: the whole model is then one graph",
            )

    def _write(self, template: Template, weights: Path, path: Path) -> Artefact:
        external = self.options.external or None  # None: only where one file cannot hold them
        with self.timed(path.name):
            model = fill_template(template, weights)
            held = () if self.merged is None else self._put_codes(model, template.dtype)
            files = save(model, path, external=external, progress=self.progress)
            if self.merged is not None:
                prove_codes(path, self.merged, held)
        return _artefact("onnx", template, files)

    def _put_codes(self, model: Any, dtype: str) -> tuple[str, ...]:
        assert self.merged is not None  # the caller looked
        form = settled(self.options.blocks, for_engines=self.trt is not None)
        return put_codes(model, self.merged, form=form, dtype=dtype)

    def _build(self, template: Template, source: Path, onnx: Artefact) -> Artefact:
        options, engine = self.options, self.stage / source.with_suffix(".engine").name
        refit = tuple(name for name in template.weights if name in self.refit)
        with self.timed(engine.name):
            build.build(
                self.trt,
                source,
                engine,
                capabilities=options.capabilities,
                profile=onnx.profile,
                tf32=options.tf32,
                refit=refit,
                progress=self.progress,
            )
        facts = EngineFacts(
            flavour=self.trt.__name__,
            version=self.trt.__version__,
            capabilities=options.capabilities,
            tf32=options.tf32,
            refittable=refit,
            onnx=onnx.files[0].sha256,
        )
        return _artefact("engine", template, (engine,), facts)

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Note how long a part takes."""
        began = time.perf_counter()
        yield
        self.seconds[part] = time.perf_counter() - began
        log.info("%s took %.1f s", part, self.seconds[part])


def _artefact(
    kind: Any, template: Template, files: Sequence[Path], engine: EngineFacts | None = None
) -> Artefact:
    return Artefact(
        kind=kind,
        dtype=template.dtype,  # type: ignore[arg-type]
        files=tuple(file_fact(path) for path in files),
        inputs=template.inputs,
        outputs=template.outputs,
        profile=template.profile(),
        engine=engine,
    )
