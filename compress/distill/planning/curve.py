"""Compress at several budgets over one cache of the teacher's outputs: size against fidelity."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from kilodelta.compress.distill import budget as budgets
from kilodelta.compress.distill.compress import compress
from kilodelta.compress.distill.options import Options
from kilodelta.compress.distill.planning.disk import FIX
from kilodelta.compress.distill.planning.picture import picture
from kilodelta.compress.distill.report import Report, Size
from kilodelta.errors import InputError, OutputError
from kilodelta.files import plain, staging, untrusted
from kilodelta.progress import Event, Progress

TABLE, PICTURE = "curve.json", "curve.svg"
MOST = 16
"""Budgets of one curve."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """What one budget bought.

    Attributes:
        name: the method; points of one name are one line of the picture.
        budget: bytes that the file may have.
        file: its name in the curve's folder.
        nbytes: bytes that it has.
        method: the method and its options.
        bits: of a coefficient.
        agreement: with the tuned model, of the merged file on held-out inputs.
        divergence: likewise.
        steps: training steps taken.
        seconds: time spent in them.
        result: the root of the merged targets.
        warnings: what a user should hear of.
    """

    name: str
    budget: int
    file: str
    nbytes: int
    method: Mapping[str, str | int]
    bits: int
    agreement: float
    divergence: float
    steps: int
    seconds: float
    result: str
    warnings: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Size against fidelity.

    Attributes:
        folder: where files, table and picture lie.
        kind: what `agreement` counts.
        base_agreement: of the base alone.
        tuned_bytes: bytes of the tuned model's tensors.
        points: one per budget that is done, the smallest first.
        interrupted: whether Ctrl-C ended it before the last budget.
        beside: what other ways keep in about as many bytes (`Options.baselines`).
        run: what makes two curves the same run (`same_run`).
    """

    folder: Path
    kind: str = ""
    base_agreement: float = 0.0
    tuned_bytes: int = 0
    points: tuple[Point, ...] = ()
    interrupted: bool = False
    beside: tuple[Size, ...] = ()
    run: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; `sizes` holds the points."""
        table = asdict(self)
        table["folder"] = str(self.folder)
        table["sizes"] = table.pop("points")
        return table


def parse_budgets(text: str) -> tuple[int, ...]:
    """Read budgets from what a user types, and put them in order.

    Raises:
        InputError: one is no size, two are equal, or there are too many.

    Example:
        >>> parse_budgets("50KB,4KB")
        (4000, 50000)
    """
    found = [budgets.parse_bytes(part) for part in text.split(",")]
    if len(set(found)) != len(found) or len(found) > MOST:
        raise InputError(
            f"{text!r} are {len(found)} budgets"
            + (", some of them equal" if len(set(found)) != len(found) else ""),
            fix=f"give up to {MOST} sizes, each once, such as 4KB,12KB,50KB",
        )
    return tuple(sorted(found))


def check_folder(folder: Path, budgets_: Sequence[int] = (), *, force: bool, resume: bool) -> None:
    """Check that a curve may be written to a folder, before any work.

    Args:
        folder: of the curve.
        budgets_: bytes of its files.
        force: whether a curve there is replaced.
        resume: whether it goes on.

    Raises:
        OutputError: it is a file, cannot be written to, or holds a curve already; or its disk has
            no room for the files.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is no folder", fix="give a folder with -o")
    if (folder / TABLE).exists() and not (force or resume):
        raise OutputError(
            f"{folder} holds a curve already",
            fix="go on with it by --resume, begin anew by --force, or give another folder with -o",
        )
    files = staging.Need(path=folder / TABLE, nbytes=sum(budgets_), what="the curve's files")
    staging.require_room(files, fix=FIX)


def run_of(folder: Path) -> Mapping[str, Any] | None:
    """Return what run the points in a folder are of, as it was written; None without points."""
    if not _points_of(folder):
        return None
    run = _table(folder).get("run")
    return run if isinstance(run, dict) else {}


def draw_curve(
    base: str | Path,
    tuned: str | Path,
    folder: Path,
    budgets_: Sequence[int],
    *,
    inputs: str | Path,
    options: Options,
    facts: Mapping[str, str],
    force: bool = False,
    resume: bool = False,
    progress: Progress,
) -> Curve:
    """Compress at each budget, and write files, `curve.json` and `curve.svg` after each.

    Args:
        base, tuned, inputs: as for `compress`.
        folder: made where it is missing; holds `teacher/` where the options name no cache.
        budgets_: bytes of each file.
        options: all but the budget.
        facts: what makes two curves the same run.
        force: begin anew.
        resume: keep the budgets that are done, and go on with the one that was interrupted.
        progress: told about every stage.

    Raises:
        KiloDeltaError: as `compress`; what was done before stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    cache = options.teacher_cache or str(folder / "teacher")
    done = _points_of(folder) if resume else {}
    beside = _beside_of(folder) if done else ()
    curve = Curve(folder=folder, beside=beside, run=facts)
    for place, budget in enumerate(sorted(budgets_)):
        file = folder / f"{budget}.kd"
        found = done.get(budget)
        if found is not None and file.exists():
            curve = replace(curve, **{**found[1], "points": (*curve.points, found[0])})
            continue
        report = compress(
            base,
            tuned,
            file,
            inputs=inputs,
            options=replace(options, budget=budget, teacher_cache=cache),
            force=force or resume,
            resume=resume and file.with_name(file.name + ".resume").exists(),
            progress=_named(progress, place, len(budgets_), budget),
        )
        curve = _with(curve, report, budget)
        _write(curve)
        if report.interrupted:
            return curve
    _write(curve)
    return curve


def _with(curve: Curve, report: Report, budget: int) -> Curve:
    """Return a curve with one more point."""
    assert report.before is not None  # there are inputs
    assert report.after is not None
    point = Point(
        name=str(report.method["name"]),
        budget=budget,
        file=report.path.name,
        nbytes=report.nbytes["file"],
        method=report.method,
        bits=report.bits,
        agreement=report.after.agreement,
        divergence=report.after.divergence,
        steps=report.steps,
        seconds=report.seconds,
        result=report.result,
        warnings=report.warnings,
    )
    return replace(
        curve,
        kind=report.kind,
        base_agreement=report.before.agreement,
        tuned_bytes=report.tuned_bytes,
        points=(*curve.points, *([] if report.interrupted else [point])),
        interrupted=report.interrupted,
        beside=_in_order((*curve.beside, *report.sizes[1:])),
    )


def _in_order(sizes: Sequence[Size]) -> tuple[Size, ...]:
    """Order what stands beside the points by its bytes, way by way, as a picture joins it.

    Each budget brings several sizes of a way, and neighbouring ones may share a rank.
    """
    ways = list(dict.fromkeys(size.name for size in sizes))
    return tuple(
        sorted(dict.fromkeys(sizes), key=lambda size: (ways.index(size.name), size.nbytes))
    )


def _named(progress: Progress, place: int, count: int, budget: int) -> Callable[[Event], None]:
    """Say at every stage for which budget it works."""

    def tell(event: Event) -> None:
        stage = f"{event.stage} {place + 1}/{count} {budget} B"
        progress(replace(event, stage=stage))

    return tell


def _write(curve: Curve) -> None:
    text = json.dumps(curve.to_json(), indent=1) + "\n"
    staging.write(curve.folder / TABLE, text.encode())
    if curve.points:
        staging.write(curve.folder / PICTURE, picture(curve.to_json()).encode())


_FIELDS: Mapping[Any, Callable[[Any, str], Any]] = {
    str: untrusted.text,
    int: untrusted.whole,
    float: untrusted.number,
    tuple[str, ...]: untrusted.texts,
    Mapping[str, str | int]: untrusted.mapping,
}
"""How a field of a point is read, by its type: the table may be from another machine."""
_Row = TypeVar("_Row", Point, Size)


def _row(kind: type[_Row], value: Any) -> _Row:
    """Return a point or size as an earlier run wrote it.

    Raises:
        FieldError, TypeError, KeyError: it is another form.
    """
    types = get_type_hints(kind)
    fields = untrusted.mapping(value, kind.__name__)
    return kind(**{name: _FIELDS[types[name]](given, name) for name, given in fields.items()})


def _table(folder: Path) -> dict[str, Any]:
    return untrusted.mapping(json.loads(plain.read(folder / TABLE, plain.JSON_LIMIT)), TABLE)


_NO_TABLE = (OSError, ValueError, TypeError, KeyError, RecursionError)


def _beside_of(folder: Path) -> tuple[Size, ...]:
    """Read what an earlier run measured beside its points; nothing where it is of another form."""
    try:
        return tuple(_row(Size, size) for size in _table(folder)["beside"])
    except _NO_TABLE:
        return ()


def _points_of(folder: Path) -> dict[int, tuple[Point, dict[str, Any]]]:
    """Read the points of an earlier run by budget, each with what the curve says of all."""
    try:
        table = _table(folder)
        general = {
            "kind": untrusted.text(table["kind"], "kind"),
            "base_agreement": untrusted.number(table["base_agreement"], "base_agreement"),
            "tuned_bytes": untrusted.whole(table["tuned_bytes"], "tuned_bytes"),
        }
        points = [_row(Point, point) for point in table["sizes"]]
    except _NO_TABLE:
        return {}
    return {point.budget: (point, general) for point in points}
