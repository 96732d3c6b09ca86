"""From a base and a fine-tune of it to a file of kilobytes, and a report of what was kept."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kilodelta import __version__
from kilodelta.compress import budget as budgets
from kilodelta.compress import fit, train
from kilodelta.compress.changes import Change, Split, compare, energy, patterns_for, split
from kilodelta.compress.distill import Data, Distilled, Schedule, distill, measure
from kilodelta.compress.objective import Measures, objective_for
from kilodelta.compress.report import Report
from kilodelta.compress.rows import Rows, to_rows
from kilodelta.compress.teacher import Teacher
from kilodelta.errors import InputError, QualityError
from kilodelta.format import file
from kilodelta.format.build import FINGERPRINTED
from kilodelta.format.checkpoint import Checkpoint, in_name_order
from kilodelta.format.coefficients import Scale
from kilodelta.format.delta import Delta, Extra
from kilodelta.format.identity import digest
from kilodelta.format.inspect import inspect
from kilodelta.format.manifest import Base, Manifest, method_options
from kilodelta.format.methods import METHODS, Lora, Method, UniLora
from kilodelta.format.targets import Patterns, Target, select
from kilodelta.models import (
    LoadedModel,
    locate,
    open_model,
    outputs,
    read_inputs,
    read_texts,
    tokenize,
)
from kilodelta.models.fill import fill
from kilodelta.models.heads import EMBEDDING
from kilodelta.progress import Progress, silent

HELD_OUT = 0.1
HELD_OUT_MOST = 512
RATES: Mapping[str, float] = {
    "lora": 1e-2,
    "nola": 5e-3,
    "randlora": 1e-3,
    "unilora": 1.5e-2,
    "vera": 5e-3,
}
"""Learning rates by method: LoRA's and Uni-LoRA's are the better of those tried on a sentence
encoder, the others the usual ones for Adam."""
LONGEST_MADE = 64


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to compress; what is None is chosen by rule."""

    budget: int | None = None
    method: Method | None = None
    bits: int | None = None
    targets: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    extras: str = "auto"
    steps: int = 1000
    rate: float | None = None
    batch: int = 32
    held_out: int | None = None
    max_length: int | None = None
    field: str = "text"
    limit: int | None = None
    min_agreement: float | None = None
    seed: int = 0
    name: str = ""
    labels: str | None = None
    """A text file, one label or query a line, for models that embed texts: what counts is which
    of them an input is nearest to, by the base model's embeddings of them."""
    model: str | None = None
    """`package.module:function` that builds the module, where the folders are bare checkpoints."""


DEFAULT_BUDGET = 20_000


def options_from(
    *,
    budget: str | None,
    method: str | None,
    rank: int | None,
    bases: int | None,
    bits: str | None,
    lr: float | None,
    **others: Any,
) -> Options:
    """Options from what a user types.

    Raises:
        InputError: a size that is none, or an option that the method does not have.
    """
    if method is None and (rank or bases):
        raise InputError(
            "--rank and --bases belong to a method", fix="add --method, or give --budget alone"
        )
    return Options(
        budget=None if budget is None else budgets.parse_bytes(budget),
        method=None if method is None else _method(method, rank=rank, bases=bases),
        bits=None if bits is None else int(bits),
        rate=lr,
        **others,
    )


def _method(name: str, **wanted: int | None) -> Method:
    kind: Any = METHODS[name]
    given = {key: value for key, value in wanted.items() if value is not None}
    known = {option.name for option in fields(kind)}
    if unknown := sorted(set(given) - known):
        raise InputError(f"{name} has no {unknown[0]}", fix=f"its options: {', '.join(known)}")
    found: Method = kind(**given)
    return found


def compress(
    base: str | Path,
    tuned: str | Path,
    out: str | Path,
    *,
    inputs: str | Path | None = None,
    options: Options = Options(),
    resume: bool = False,
    progress: Progress = silent,
) -> Report:
    """Distil a fine-tuned model into a `.kd` file.

    Args:
        base: the model that the fine-tune began from: a folder, or a hub id.
        tuned: the fine-tuned model, likewise; a head that the base lacks travels whole.
        out: the `.kd` file to write.
        inputs: unlabelled inputs (`kilodelta.models.read_inputs`); without them only a LoRA by
            truncated SVD is possible.
        resume: go on with an interrupted run of the same arguments.

    Raises:
        BaseMismatchError: the two models do not belong together.
        InputError: inputs or options make no sense.
        QualityError: the agreement stayed below `options.min_agreement`; the file is written.
    """
    job = _prepare(locate(base), locate(tuned), Path(out), options)
    report = _fit(job, progress) if inputs is None else _distil(job, inputs, resume, progress)
    _check_quality(report, options)
    return report


@dataclass(frozen=True, kw_only=True)
class _Job:
    """Everything that is known before the first step."""

    base: Checkpoint
    tuned: Checkpoint
    out: Path
    options: Options
    student: LoadedModel
    names: Mapping[str, str]
    """Checkpoint name to state name, of the base's tensors and of those that only `tuned` has."""
    changes: tuple[Change, ...]
    split: Split
    targets: tuple[Target, ...]
    patterns: Patterns
    method: Method
    bits: int


def _prepare(base: Path, tuned: Path, out: Path, options: Options) -> _Job:
    if not out.parent.exists():
        raise InputError(f"{out.parent} does not exist", fix="make the folder first")
    before = Checkpoint.open(base)
    student = open_model(options.model or str(tuned), weights=before)
    after, names = _as_base_names(Checkpoint.open(tuned), student, options)
    changes = compare(before, after)
    parts = _split(student, changes, options)
    patterns = _patterns(before, student, parts)
    targets = select((before.info(name) for name in before.names), patterns)
    choice = _choose(before, after, targets, patterns, parts, options)
    return _Job(
        base=before,
        tuned=after,
        out=out,
        options=options,
        student=student,
        names=names,
        changes=changes,
        split=parts,
        targets=targets,
        patterns=patterns,
        method=choice.method,
        bits=choice.bits,
    )


def _as_base_names(
    tuned: Checkpoint, student: LoadedModel, options: Options
) -> tuple[Checkpoint, dict[str, str]]:
    """The tuned model under the base's names, and all names by the student's state: a new head
    puts a prefix before the names of the encoder below it."""
    own = open_model(options.model or str(tuned.path), weights=tuned).names
    base_name = {state: name for name, state in student.names.items()}
    new = {name: base_name.get(state, name) for name, state in own.items()}
    return tuned.renamed(new), {**{new[name]: own[name] for name in own}, **student.names}


def _split(student: LoadedModel, changes: Sequence[Change], options: Options) -> Split:
    state_names = {state: name for name, state in student.names.items()}
    weights = [
        f"{path}.weight"
        for path, module in student.module.named_modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.modules.conv._ConvNd))
        or type(module).__name__ == "Conv1D"
    ]
    parameters = {name for name, _ in student.module.named_parameters(remove_duplicate=False)}
    buffers = [n for state, n in state_names.items() if state not in parameters]
    return split(
        changes,
        include=options.targets,
        exclude=options.exclude,
        extras=options.extras,
        layers=[state_names[name] for name in weights if name in state_names],
        buffers=buffers,
    )


def _patterns(base: Checkpoint, student: LoadedModel, parts: Split) -> Patterns:
    infos = [base.info(name) for name in base.names]
    matrices = [t.name for t in select(infos, Patterns(include=("*",)))]
    chosen = [change.name for change in parts.targets]
    others = [name for name in matrices if name not in set(chosen)]
    turned = [name for name in chosen if _is_transposed(student, name)]
    straight = [name for name in chosen if name not in set(turned)]
    return Patterns(
        include=patterns_for(chosen, others),
        transposed=patterns_for(turned, straight) if turned else (),
    )


def _is_transposed(student: LoadedModel, name: str) -> bool:
    owner = student.names[name].rpartition(".")[0]
    return type(student.module.get_submodule(owner)).__name__ == "Conv1D"


def _choose(
    base: Checkpoint,
    tuned: Checkpoint,
    targets: tuple[Target, ...],
    patterns: Patterns,
    parts: Split,
    options: Options,
) -> budgets.Choice:
    if options.method is not None:
        return budgets.Choice(method=options.method, bits=options.bits or budgets.BITS)
    extras = sum(change.nbytes for change in parts.extras)
    overhead = extras + _header_bytes(base, targets, patterns, parts)
    choice = budgets.choose(options.budget or DEFAULT_BUDGET, overhead, targets)
    return replace(choice, bits=options.bits) if options.bits else choice


def _header_bytes(
    base: Checkpoint, targets: tuple[Target, ...], patterns: Patterns, parts: Split
) -> int:
    """Bytes of a file beside its coefficients and extras, by writing one with none in it."""
    method = UniLora(bases=1 << 20, rank=4, anchor=-32767)
    manifest = Manifest(
        base=Base(
            name="x" * LONGEST_MADE,
            root="sha256:" + "0" * 64,
            tensors=len(base.names),
            fingerprints=b"\0" * 2 * len(base.names) if len(base.names) <= FINGERPRINTED else b"",
        ),
        method=method,
        seed=0,
        patterns=patterns,
        count=len(targets),
        bits=16,
        scales=(Scale(),) * (1 + 2 * len(targets)),
        extras=tuple(sorted(change.name for change in parts.extras)),
        result="sha256:" + "0" * 64,
        made={key: "x" * 12 for key in _MADE},
    )
    empty = np.empty(0, np.uint8)
    extras = {c.name: Extra(dtype="F32", shape=(0, *c.shape[1:]), data=empty) for c in parts.extras}
    return file.size(Delta(manifest=manifest, blob=empty, extras=extras))


_MADE = ("tool", "agreement", "kl", "held_out", "inputs", "steps", "weight_error")


def _attach(job: _Job) -> None:
    """Hook the delta into the student, which then holds the extras' tuned values."""
    module = job.student.module
    extras = {c.name: job.names.get(c.name) for c in job.split.extras}
    present = {name: state for name, state in extras.items() if state is not None}
    train.attach(
        module,
        job.method,
        job.patterns.include,
        seed=job.options.seed,
        extras=tuple(present),
        names=job.names,
    )
    fill(module, job.tuned, present)
    if isinstance(job.method, Lora):
        fit.start_from_svd(job.student, job.base, job.tuned)


def _fit(job: _Job, progress: Progress) -> Report:
    """Without inputs: LoRA by truncated SVD, its error measured."""
    fit.refuse_without_inputs(job.method, {target.name: target for target in job.targets})
    began = time.monotonic()
    _attach(job)
    train.quantise(job.student.module, job.bits)
    done = Distilled(
        held_out=Measures(agreement=0.0, divergence=0.0),
        steps=0,
        seconds=time.monotonic() - began,
        interrupted=False,
    )
    return _save(job, done, None, None, progress)


def _distil(job: _Job, inputs: str | Path, resume: bool, progress: Progress) -> Report:
    options = job.options
    teacher = open_model(options.model or str(job.tuned.path), weights=job.tuned)
    rows = _rows(job, inputs)
    order = torch.randperm(
        len(rows), generator=torch.Generator().manual_seed(options.seed)
    ).tolist()
    count = _held_out(len(rows), options)
    voice = Teacher(teacher, rows, progress)
    bank = voice.bank
    learned = order[count:]
    labels = _labels(job, voice.output)
    data = Data(
        rows=rows,
        teacher=voice,
        objective=objective_for(voice.output, None if bank is None else bank[learned], labels),
        learned=learned,
        held_out=order[:count],
    )
    before = measure(job.student, data, data.held_out)
    _attach(job)
    schedule = Schedule(
        steps=options.steps,
        rate=options.rate or RATES[job.method.name],
        batch=options.batch,
        bits=job.bits,
        seed=options.seed,
    )
    kept = job.out.with_name(job.out.name + ".resume")
    key = _key(job, inputs, schedule)
    done = distill(job.student, data, schedule, progress, kept=kept, key=key, resume=resume)
    report = _save(job, done, data, before, progress)
    if not done.interrupted:
        kept.unlink(missing_ok=True)
    return report


def _labels(job: _Job, output: str) -> torch.Tensor | None:
    """The base model's embeddings of the labels, (n, width)."""
    spec = job.options.labels
    if spec is None:
        return None
    if output != EMBEDDING:
        raise InputError(
            f"--labels compares embeddings, but this model puts out {output}",
            fix="leave --labels away: logits are compared as they are",
        )
    with torch.no_grad():
        return outputs(job.student, tokenize(job.student, read_texts(spec)))[EMBEDDING]


def _rows(job: _Job, inputs: str | Path) -> Rows:
    options = job.options
    batches = read_inputs(
        inputs,
        job.student,
        limit=options.limit,
        batch_size=256,
        field=options.field,
        max_length=options.max_length,
    )
    pad = getattr(job.student.tokenizer, "pad_token_id", None) or 0
    rows = to_rows(batches, pad)
    if len(rows) < 8:
        raise InputError(
            f"{inputs} holds {len(rows)} inputs; distillation needs at least 8, better thousands",
            fix="give more inputs; they need no labels",
        )
    return rows


def _held_out(count: int, options: Options) -> int:
    wanted = options.held_out
    if wanted is None:
        wanted = min(HELD_OUT_MOST, max(1, round(HELD_OUT * count)))
    if not 1 <= wanted <= count - options.batch // 8:
        raise InputError(
            f"{wanted} of {count} inputs cannot be held out", fix="give a smaller --held-out"
        )
    return wanted


def _key(job: _Job, inputs: str | Path, schedule: Schedule) -> str:
    """What makes two runs the same."""
    facts = {
        "base": digest(job.base).root,
        "tuned": digest(job.tuned).root,
        "inputs": _inputs_digest(inputs),
        "labels": _inputs_digest(job.options.labels) if job.options.labels else "",
        "method": method_options(job.method),
        "schedule": asdict(schedule),
        "patterns": asdict(job.patterns),
        "extras": [change.name for change in job.split.extras],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _inputs_digest(inputs: str | Path) -> str:
    path = Path(inputs)
    data = path.read_bytes() if path.is_file() else str(inputs).encode()
    return hashlib.sha256(data).hexdigest()[:12]


def _save(
    job: _Job,
    done: Distilled,
    data: Data | None,
    before: Measures | None,
    progress: Progress,
) -> Report:
    attachment = train.attached(job.student.module)
    error = fit.weight_error(attachment, job.base, job.tuned)
    made: dict[str, Any] = {"tool": f"kilodelta {__version__}", "weight_error": round(error, 4)}
    if data is not None:
        made |= {
            "agreement": round(done.held_out.agreement, 4),
            "kl": round(done.held_out.divergence, 5),
            "held_out": len(data.held_out),
            "steps": done.steps,
        }
    delta = train.to_delta(
        job.student.module,
        job.base,
        name=job.options.name or job.base.path.name,
        made=made,
        progress=progress,
    )
    delta = _with_new_extras(delta, job)
    delta.save(job.out)
    return _report(job, done, data, before, error, delta)


def _with_new_extras(delta: Delta, job: _Job) -> Delta:
    """Tensors that the student has no place for travel whole too (a removed buffer, say)."""
    absent = [c.name for c in job.split.extras if c.name not in delta.extras]
    if not absent:
        return delta
    added = {
        name: Extra(
            dtype=job.tuned.info(name).dtype,
            shape=job.tuned.info(name).shape,
            data=job.tuned.data(name),
        )
        for name in absent
    }
    extras = {**delta.extras, **added}
    manifest = replace(delta.manifest, extras=in_name_order(extras))
    return replace(delta, manifest=manifest, extras=extras)


def _report(
    job: _Job,
    done: Distilled,
    data: Data | None,
    before: Measures | None,
    error: float,
    delta: Delta,
) -> Report:
    whole = energy(job.changes)
    kind = data.objective.kind if data is not None else ""
    return Report(
        path=job.out,
        method=method_options(delta.method),
        bits=delta.manifest.bits,
        nbytes=inspect(job.out).nbytes,
        tuned_bytes=sum(job.tuned.info(name).nbytes for name in job.tuned.names),
        output=data.objective.name if data is not None else "",
        kind="top-1" if kind == "logits" else "cosine" if kind else "",
        held_out=len(data.held_out) if data is not None else 0,
        before=before,
        after=done.held_out if data is not None else None,
        weight_error=error,
        targets=len(job.targets),
        extras=delta.manifest.extras,
        dropped=job.split.dropped,
        dropped_energy=energy(job.split.dropped) / max(whole, 1e-60),
        steps=done.steps,
        seconds=done.seconds,
        interrupted=done.interrupted,
        result=delta.manifest.result,
    )


def _check_quality(report: Report, options: Options) -> None:
    if options.min_agreement is None:
        return
    if report.after is None:
        raise InputError("agreement cannot be measured without inputs", fix="give --inputs")
    if report.after.agreement < options.min_agreement:
        raise QualityError(
            f"agreement with the tuned model is {report.after.agreement:.4f} ({report.kind}), "
            f"below {options.min_agreement}; {report.path} is written all the same",
            fix="raise --budget or --steps, or give more inputs",
        )
