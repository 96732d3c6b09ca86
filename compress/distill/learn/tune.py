"""Search for a learning rate by short trainings, for as long as the user has time (`--tune`).

The trials and their order are fixed: the method's rate, half and twice it, and on from the better
side by factors of two for as long as that helps. Time decides only how many of them are taken, so
equal numbers of trials choose equal rates, and `--lr` with the chosen one trains the same
coefficients.

The trials lie beside the file to write until it is written, so that `--resume` goes on with the
first one that is missing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kilodelta.compress.distill.learn.data import Data
from kilodelta.compress.distill.learn.loop import distill
from kilodelta.compress.distill.learn.schedule import Schedule
from kilodelta.compress.distill.learn.watch import SHORT
from kilodelta.compress.training import train
from kilodelta.errors import InputError
from kilodelta.files import staging
from kilodelta.models import LoadedModel
from kilodelta.progress import Progress

SHARE = 4
"""Steps of a training for each one of a trial, of which there are `SHORT` at least."""
FARTHEST = 6
"""Factors of two that a rate may be from the method's own."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One short training.

    Attributes:
        rate: its learning rate, as a share of the method's.
        divergence: of its best state on the held-out rows.
        seconds: that it took.
    """

    rate: float
    divergence: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What a search chose.

    Attributes:
        rate: the learning rate to train at.
        trials: how many trainings it was chosen of.
    """

    rate: float
    trials: int


def place_of(out: Path) -> Path:
    """Return where the trials towards a file lie.

    Example:
        >>> place_of(Path("task.kd")).name
        'task.kd.trials'
    """
    return out.with_name(out.name + ".trials")


def next_rate(trials: Sequence[Trial]) -> float | None:
    """Return the next share of the method's rate to try; None where no further one can be better.

    Example:
        >>> def tried(**by): return [Trial(rate=float(k[1:]), divergence=v, seconds=0)
        ...                          for k, v in by.items()]
        >>> next_rate([]), next_rate(tried(r1=0.5)), next_rate(tried(r1=0.5) * 2)
        (1.0, 0.5, 2.0)
    """
    if len(trials) < 3:
        return (1.0, 0.5, 2.0)[len(trials)]
    chosen = best(trials).rate
    if chosen == 1.0:
        return None
    onward = chosen * 2 if chosen > 1 else chosen / 2
    tried = {trial.rate for trial in trials}
    return None if onward in tried or not 2.0**-FARTHEST <= onward <= 2.0**FARTHEST else onward


def best(trials: Sequence[Trial]) -> Trial:
    """Return the trial that came nearest to the tuned model; of equals the first."""
    return min(trials, key=lambda trial: trial.divergence)


def trial_steps(steps: int) -> int:
    """Return the steps of a trial for a training of so many.

    Example:
        >>> trial_steps(800), trial_steps(200), trial_steps(16)
        (200, 100, 16)
    """
    return min(steps, max(SHORT, steps // SHARE))


def tune(
    loaded: LoadedModel,
    data: Data,
    schedule: Schedule,
    minutes: float,
    progress: Progress,
    *,
    kept: Path,
    facts: Mapping[str, str],
    resume: bool = False,
    piece: int | None = None,
) -> Tuned:
    """Try rates by short trainings, and leave the student as it was.

    Args:
        loaded: the student, its delta attached.
        data: what it learns from; a trial is judged by the held-out rows.
        schedule: of the training that is to follow; its rate is the method's.
        minutes: no trial begins that would probably end after so many; one is always taken.
        progress: told about every step.
        kept: where the trials are written.
        facts: what must be equal for trials to be taken up again.
        resume: take up the trials in `kept`.
        piece: rows whose activations memory holds at once; all of a batch by default.

    Raises:
        InputError: the trials to take up are damaged, or of another run.
        KeyboardInterrupt: Ctrl-C; the trials that ended are kept.
    """
    trials, ended = _read(kept, facts) if resume and kept.exists() else ([], False)
    short = replace(schedule, steps=trial_steps(schedule.steps))
    module = loaded.module
    start = {name: values.clone() for name, values in module.state_dict().items()}
    while not ended:
        share = next_rate(trials)
        # The first process looks at the clock for all.
        late = bool(data.ranks.gather(_is_late(trials, minutes))[0])
        if share is None or late:
            ended = True
        else:
            began = time.monotonic()
            rated = replace(short, rate=schedule.rate * share)
            done = distill(loaded, data, rated, progress, piece=piece)
            module.load_state_dict(start)
            train.quantise(module, None)
            if done.interrupted:
                raise KeyboardInterrupt
            divergence = data.objective.overall(done.measures).divergence
            seconds = time.monotonic() - began
            trials.append(Trial(rate=share, divergence=divergence, seconds=seconds))
        if data.ranks.writes:
            _write(kept, facts, trials, ended)
    return Tuned(rate=schedule.rate * best(trials).rate, trials=len(trials))


def _is_late(trials: Sequence[Trial], minutes: float) -> bool:
    """Return whether one more trial would probably end after the time that is given."""
    if not trials:
        return False
    spent = sum(trial.seconds for trial in trials)
    return spent + trials[-1].seconds > 60 * minutes


def _write(path: Path, facts: Mapping[str, str], trials: Sequence[Trial], ended: bool) -> None:
    content = {"facts": dict(facts), "trials": [asdict(t) for t in trials], "ended": ended}
    with staging.new_file(path) as stage:
        stage.write_text(json.dumps(content, indent=1) + "\n")


def _read(path: Path, facts: Mapping[str, str]) -> tuple[list[Trial], bool]:
    """Read the trials of a run that was interrupted, and whether the search had ended.

    Raises:
        InputError: they are damaged, or of a run with other facts.
    """
    anew = "start without --resume, and with --force"
    try:
        content: Any = json.loads(path.read_bytes())
        fields = ("rate", "divergence", "seconds")
        trials = [Trial(**{name: float(t[name]) for name in fields}) for t in content["trials"]]
        other, ended = dict(content["facts"]), bool(content["ended"])
    except (OSError, ValueError, TypeError, KeyError) as problem:
        raise InputError(f"{path} is damaged: it holds no trials of --tune", fix=anew) from problem
    differing = [key for key in {**other, **facts} if other.get(key) != facts.get(key)]
    if differing:
        raise InputError(
            f"{path} belongs to a run with other {', '.join(differing)}",
            fix="give the same arguments, or " + anew,
        )
    if ended and not trials:
        raise InputError(f"{path} is damaged: a search ended without a trial", fix=anew)
    return trials, ended
