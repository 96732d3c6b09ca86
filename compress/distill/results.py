"""Write the file with what was measured in it, report it, and say what a user should hear of."""

from __future__ import annotations

from dataclasses import replace

from kilodelta import __version__
from kilodelta.compress.distill import svd
from kilodelta.compress.distill.job import Job
from kilodelta.compress.distill.learn.data import Data
from kilodelta.compress.distill.learn.objective import Measures
from kilodelta.compress.distill.learn.schedule import Distilled
from kilodelta.compress.distill.learn.watch import SLOWER
from kilodelta.compress.distill.options import Options
from kilodelta.compress.distill.precisions.fidelity import Fidelity, few_codes, made_of
from kilodelta.compress.distill.report import Matched, Report
from kilodelta.errors import QualityError
from kilodelta.format.delta import Delta
from kilodelta.format.inspect import inspect
from kilodelta.merging.grid_results import GRID_FACTS


def finish(
    job: Job,
    delta: Delta,
    done: Distilled | None,
    data: Data | None,
    before: tuple[Measures, ...] | None,
    after: tuple[Measures, ...] | None,
    fidelity: tuple[Fidelity, ...] = (),
) -> Report:
    """Write the file with what was measured, and report it.

    Args:
        job: what was settled before.
        delta: the trained or fitted delta, bound to the base.
        done: what the training reached; None without inputs, as the following three.
        data: what was learnt from.
        before: the base's measures on the held-out rows, per output.
        after: those of the base with the delta merged into it.
        fidelity: what it keeps in each precision that was asked for.

    Raises:
        OutputError: the file cannot be written.
    """
    error, layers = svd.compare_weights(delta, job.pair.base, job.pair.tuned, job.changes)
    made: dict[str, str | int | float | bool] = {
        "tool": f"kilodelta {__version__}",
        "weight_error": round(error, 4),
        **{key: delta.manifest.made[key] for key in GRID_FACTS if key in delta.manifest.made},
        **made_of(fidelity),
    }
    overall: tuple[Measures, Measures] | None = None
    if data is not None and done is not None and before is not None and after is not None:
        overall = data.objective.overall(before), data.objective.overall(after)
        made |= _measured(data, done, *overall)
    delta = replace(delta, manifest=replace(delta.manifest, made=made))
    delta.save(job.out)
    return Report(
        path=job.out,
        method=delta.method.to_manifest(),
        bits=delta.manifest.bits,
        nbytes=inspect(job.out).nbytes,
        tuned_bytes=sum(e.nbytes for s in job.pair.tuned.shards for e in s.layout.entries),
        outputs=_matched(data, before or (), after or ()),
        ignored={} if data is None else data.survey.ignored,
        kind="" if data is None else data.objective.counts,
        held_out=0 if data is None else len(data.held_out),
        before=None if overall is None else overall[0],
        after=None if overall is None else overall[1],
        curve=() if done is None else done.curve,
        weight_error=error,
        layers=layers,
        targets=len(job.targets),
        extras=delta.manifest.extras,
        new=tuple(change.name for change in job.split.extras if change.is_new),
        dropped=job.split.dropped,
        dropped_energy=job.dropped_share,
        config=delta.manifest.config,
        steps=0 if done is None else done.steps,
        seconds=0.0 if done is None else done.seconds,
        interrupted=done is not None and done.interrupted,
        result=delta.manifest.result,
        fidelity=fidelity,
        quantised=job.quantised is not None,
        warnings=(*job.warnings, *_warnings(data, done, overall), *few_codes(made, fidelity)),
    )


def _measured(
    data: Data, done: Distilled, before: Measures, after: Measures
) -> dict[str, str | int | float | bool]:
    """Write what the manifest says about the agreement, each figure by the name of what it is."""
    counts = data.objective.counts
    divergence = "kl" if counts in ("top-1", "yes-no") else "distance"
    return {
        "agreement": round(after.agreement, 4),
        "agreement_counts": counts,
        "base_agreement": round(before.agreement, 4),
        divergence: round(after.divergence, 5),
        "held_out": len(data.held_out),
        "inputs": data.rows.digest()[:12],
        "steps": done.steps,
        **({"interrupted": True} if done.interrupted else {}),
        **({"rate": done.rate, "trials": done.trials} if done.trials else {}),
    }


def _matched(
    data: Data | None, before: tuple[Measures, ...], after: tuple[Measures, ...]
) -> tuple[Matched, ...]:
    if data is None:
        return ()
    objective = data.objective
    return tuple(
        Matched(
            name=output.name,
            kind=output.kind,
            counts=comparison.counts,
            axis=output.axis,
            size=output.size,
            weight=output.weight,
            before=was,
            after=now,
        )
        for output, comparison, was, now in zip(
            objective.outputs, objective.comparisons, before, after, strict=True
        )
    )


def _warnings(
    data: Data | None, done: Distilled | None, overall: tuple[Measures, Measures] | None
) -> list[str]:
    found = []
    if overall is not None:
        before, after = overall
        if after.divergence > before.divergence or after.agreement < before.agreement:
            found.append(
                "the file is worse than none: with it the base agrees with the tuned model by"
                f" {after.agreement:.4f} (divergence {after.divergence:.4f}), without it by"
                f" {before.agreement:.4f} ({before.divergence:.4f}); give a larger --budget, more"
                " --steps or inputs, or a lower --lr"
            )
    if done is not None and done.interrupted:
        found.append(f"interrupted after {done.steps} steps: --resume goes on")
    if done is not None and done.again:
        found.append(
            "the training led away from the tuned model and began again"
            f" {'once' if done.again == 1 else f'{done.again} times'}, at"
            f" last with {SLOWER**-done.again:.2g} of the learning rate"
        )
    if done is not None and done.trials == 1:
        found.append(
            "--tune had time for one trial, so no rate was compared with another: give more"
            " minutes, or leave it away"
        )
    if done is not None and done.piece:
        found.append(
            f"memory is short: steps were computed {done.piece} inputs at a time, with the same"
            " gradient and more time; a smaller --batch is faster"
        )
    if data is not None:
        found += [f"output {name} {why}: not matched" for name, why in data.survey.ignored.items()]
        if data.repeated:
            equal = "input equals" if data.repeated == 1 else "inputs equal"
            found.append(f"{data.repeated} {equal} one that is held out: not learnt from")
        if data.left_out:
            cut = "conversation was" if data.left_out == 1 else "conversations were"
            found.append(
                f"{data.left_out} {cut} cut before an answer, and left out; see --max-length"
            )
        if data.survey.one_row:
            found.append("the model computes one row at a time, so a step takes longer")
    return found


def check_quality(report: Report, options: Options) -> None:
    """Check a finished result against what the caller allows.

    Raises:
        QualityError: it agrees less; the file is written all the same.
    """
    if options.min_agreement is None or report.after is None or report.interrupted:
        return
    for one in report.fidelity:
        if one.agreement < options.min_agreement:
            raise QualityError(
                f"agreement with the tuned model is {one.agreement:.4f} ({report.kind}) in"
                f" {one.name}, below {options.min_agreement}; {report.path} is written all the"
                " same",
                fix=f"raise --budget or --steps, or leave {one.name} out of --for",
            )
    if report.after.agreement < options.min_agreement:
        raise QualityError(
            f"agreement with the tuned model is {report.after.agreement:.4f} ({report.kind}), "
            f"below {options.min_agreement}; {report.path} is written all the same",
            fix="raise --budget or --steps, or give more inputs",
        )
