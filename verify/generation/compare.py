"""Hold what a decoder writes in its runtimes against the merged model.

The merged model need not write by itself. If every token that a runtime chose is the one to which
the model gives the highest score after the tokens before it, then, token by token, the two write
the same greedy text. So one pass over the finished text proves it, in float64 and without a cache:
neither a wrong cache nor a rounding is shared with the runtime.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kilodelta.errors import InputError, KiloDeltaError, ProofError
from kilodelta.export.decoder.genai import CONFIG
from kilodelta.export.manifest.facts import Artefact
from kilodelta.models import LoadedModel
from kilodelta.models.generation.cache import PAST
from kilodelta.models.generation.prompts import Prompt, read_prompts
from kilodelta.models.generation.seq2seq import DECODER, is_seq2seq
from kilodelta.models.generation.source_prompts import read_sources
from kilodelta.models.generation.special_tokens import special_tokens
from kilodelta.progress import Event, Progress
from kilodelta.verify.generation.halves_writer import HalvesWriter
from kilodelta.verify.generation.writers import GenaiWriter, OnnxWriter, Writer, Written
from kilodelta.verify.options import Subject, VerifyOptions
from kilodelta.verify.parity.bench import precision_of
from kilodelta.verify.parity.cases import Case
from kilodelta.verify.parity.gate import limit
from kilodelta.verify.parity.halves import Halves, joined
from kilodelta.verify.parity.judge import judge
from kilodelta.verify.parity.metrics import compare
from kilodelta.verify.parity.models import ModelPair, open_pair
from kilodelta.verify.parity.reference import Reference
from kilodelta.verify.parity.report import Report
from kilodelta.verify.parity.result import Check, Result
from kilodelta.verify.runners.runner import Arrays, Batch

PROMPTS = 8
"""Prompts that are read unless the user says otherwise: each is a text in every runtime."""
TEXT = "greedy text"
"""The name of the written tokens among an artefact's outputs."""


def has_cache(artefact: Artefact) -> bool:
    """Return whether an artefact is a decoder with a cache."""
    return any(port.name.startswith(f"{PAST}.") for port in artefact.inputs)


def compare_generation(subject: Subject, options: VerifyOptions, progress: Progress) -> Report:
    """Let every runtime continue the prompts, and judge texts and logits.

    Args:
        subject: what is verified; its digests are proved.
        options: how; `options.inputs` and `options.generate` are given.
        progress: called as work goes on.

    Raises:
        InputError: the prompts cannot be read, or no artefact has a cache.
        ProofError: base and merged model give the same logits on these texts.
    """
    exported = () if subject.export is None else joined(subject.export.artefacts)
    writing = [a for a in exported if can_write(a) and a.engine is None]
    if not writing or subject.folder is None:
        raise InputError(
            "there is no decoder with a cache to write anything",
            fix="give an export made with --kv-cache, or leave --generate out",
        )
    spec = str(options.inputs)
    if not any(isinstance(a, Halves) for a in writing) and not spec.endswith((".jsonl", ".txt")):
        raise InputError(f"{spec} is no file of prompts", fix="give a .jsonl or .txt file")
    pair = open_pair(subject, options, progress)
    end = special_tokens(pair.merged, subject.place).end
    prompts = _prompts(pair.merged, options, end)
    bench = _Bench(pair, prompts, options.generate or 1, end, options, progress)
    results = [
        bench.judge(writer, artefact)
        for artefact in writing
        for writer in _writers(subject.folder, artefact)
    ]
    return Report(
        results=tuple(results),
        required=options.require,
        inputs=str(options.inputs),
        rows=len(prompts),
    )


def can_write(artefact: Artefact) -> bool:
    """Return whether an artefact writes texts: with a cache, or as an encoder and a decoder."""
    return isinstance(artefact, Halves) or has_cache(artefact)


def _prompts(merged: LoadedModel, options: VerifyOptions, end: Sequence[int]) -> list[Prompt]:
    spec, limit = str(options.inputs), options.limit or PROMPTS
    if is_seq2seq(merged):
        return read_sources(spec, merged, end=end, field=options.field, limit=limit)
    return read_prompts(spec, merged, field=options.field, limit=limit)


def _writers(folder: Path, artefact: Artefact) -> list[Writer | HalvesWriter | GenaiWriter]:
    if isinstance(artefact, Halves):
        halves = HalvesWriter(folder / artefact.encoder.file, folder / artefact.decoder.file)
        return [halves, *_genai(folder, artefact.decoder)]
    return [OnnxWriter(folder / artefact.file), *_genai(folder, artefact)]


def _genai(folder: Path, artefact: Artefact) -> list[GenaiWriter]:
    """Return ONNX Runtime GenAI, where the artefact brings its configuration."""
    stated = any(file.file == CONFIG for file in artefact.files)
    return [GenaiWriter(folder, half=artefact.dtype == "float16")] if stated else []


class _Bench:
    """Judges writers; those that wrote the same texts share a reference."""

    def __init__(
        self,
        pair: ModelPair,
        prompts: Sequence[Prompt],
        most: int,
        end: Sequence[int],
        options: VerifyOptions,
        progress: Progress,
    ) -> None:
        self._pair, self._prompts, self._most, self._end = pair, prompts, most, tuple(end)
        self._options, self._progress = options, progress
        self._references: dict[tuple[tuple[int, ...], ...], Reference] = {}

    def judge(self, writer: Writer | HalvesWriter | GenaiWriter, artefact: Artefact) -> Result:
        """Let one runtime write all texts, and judge them."""
        precision = precision_of(artefact)
        failed = Result(artefact=artefact.file, runner=writer.name, precision=precision)
        try:
            missing = writer.available()
            if missing is not None:
                return replace(failed, error=missing)
            written = [self._write(writer, prompt) for prompt in self._prompts]
        except KiloDeltaError as error:
            return replace(failed, error=error, broken=True)
        reference = self._reference(written)
        result = judge(
            _Replay(writer.name, written, reference.cases),
            reference,
            artefact=artefact.file,
            precision=precision,
        )
        return replace(result, checks=(*result.checks, *self._texts(written, reference, result)))

    def _write(self, writer: Writer | HalvesWriter | GenaiWriter, prompt: Prompt) -> Written:
        self._progress(
            Event(
                stage="write",
                done=self._prompts.index(prompt) + 1,
                total=len(self._prompts),
                unit="texts",
                detail={"runner": writer.name},
            )
        )
        room = _room(self._pair.merged, len(prompt.ids))
        most = min(self._most, room)
        if isinstance(writer, (HalvesWriter, GenaiWriter)):
            return writer.write(prompt.ids, most, self._end, prompt.source)
        return writer.write(prompt.ids, most, self._end)

    def _reference(self, written: Sequence[Written]) -> Reference:
        key = tuple(text.fed for text in written)
        if key not in self._references:
            self._references[key] = Reference(
                self._pair.merged.view(),
                self._pair.base.view(),
                outputs=("logits",),
                scores=("logits",),
                cases=[
                    _case(n, text, prompt)
                    for n, (text, prompt) in enumerate(zip(written, self._prompts, strict=True), 1)
                ],
                device=self._options.device,
                progress=self._progress,
            )
        return self._references[key]

    def _texts(
        self, written: Sequence[Written], reference: Reference, result: Result
    ) -> tuple[Check, ...]:
        """One check of every text: the share of tokens that the merged model would not choose."""
        logits = {check.case: check for check in result.checks}
        checks = []
        for text, case, arrays in zip(written, reference.cases, reference.merged, strict=True):
            scores = arrays["logits"][0, text.start - 1 :]
            allowed = logits[case.name].limit.relative_max if case.name in logits else 0.0
            right = self._right(text.chosen, scores, allowed)
            error = compare(np.array(text.chosen), right)
            checks.append(
                Check(
                    case=case.name,
                    shape=(1, len(text.chosen)),
                    output=TEXT,
                    error=error,
                    torch=compare(right, right),
                    limit=limit((), "float32"),
                )
            )
        return tuple(checks)

    def _right(
        self, chosen: Sequence[int], scores: NDArray[np.float64], allowed: float
    ) -> NDArray[np.int64]:
        """What the merged model chooses; the token chosen, where its score is as high.

        Two scores that lie within what rounding may move both of are a tie, which any correct
        program may break either way. All end tokens are one.
        """
        best = scores.argmax(-1)
        rounding = 2 * allowed * float(np.abs(scores).max())
        right: NDArray[np.int64] = best.copy()
        for n, token in enumerate(chosen):
            is_tie = scores[n, best[n]] - scores[n, token] <= rounding
            if is_tie or (token in self._end and best[n] in self._end):
                right[n] = token
        return right


def _room(merged: LoadedModel, prompt: int) -> int:
    """How many tokens fit behind a prompt; at least one."""
    return 1 << 20 if merged.max_length is None else max(1, merged.max_length - prompt)


def _case(number: int, text: Written, prompt: Prompt) -> Case:
    """A finished text as the whole model takes it."""
    ids = np.array([text.fed], np.int64)
    if prompt.source:
        read = {name: tensor.numpy() for name, tensor in prompt.source.items()}
        return Case(name=f"text {number}", batch={**read, DECODER: ids})
    return Case(
        name=f"text {number}", batch={"input_ids": ids, "attention_mask": np.ones_like(ids)}
    )


class _Replay:
    """A runner that gives back what was computed while the texts were written."""

    def __init__(self, name: str, written: Sequence[Written], cases: Sequence[Case]) -> None:
        self.name = name
        self._logits = {
            id(case.batch): text.logits[None] for case, text in zip(cases, written, strict=True)
        }

    def available(self) -> KiloDeltaError | None:
        """Return None: it has run already."""
        return None

    def run(self, batch: Batch) -> Arrays:
        """Return the logits `(1, tokens, vocabulary)` of a case."""
        if id(batch) not in self._logits:
            raise ProofError("no text was written for these inputs", fix="verify again")
        return {"logits": self._logits[id(batch)]}
