"""What one artefact showed in one runner, and what the merged model keeps of the tuned one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from kilodelta.errors import KiloDeltaError
from kilodelta.verify.parity.gate import Limit, carries
from kilodelta.verify.parity.metrics import Metrics, jsonable

Json: TypeAlias = dict[str, Any]

STATUSES = PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"
NEARER_BASE = 0.5
"""Share of the fine-tune's effect at which outputs are as near to the base's as to the merged."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One output in one case.

    Attributes:
        case: the case's name.
        shape: of the first input.
        output: the output's name.
        error: the artefact's error against the reference.
        torch: plain torch's error in the same precision.
        limit: what is admitted.
    """

    case: str
    shape: tuple[int, ...]
    output: str
    error: Metrics
    torch: Metrics
    limit: Limit

    @property
    def passed(self) -> bool:
        """Whether the error is within the limit."""
        return self.limit.admits(self.error)

    @property
    def strain(self) -> float:
        """The larger of both errors in units of its limit: more than 1 fails."""
        return max(
            self.error.relative_l2 / self.limit.relative_l2,
            self.error.relative_max / self.limit.relative_max,
        )

    def to_json(self) -> Json:
        """Return everything, fit for strict JSON."""
        return {
            "case": self.case,
            "shape": list(self.shape),
            "output": self.output,
            "error": self.error.to_json(),
            "torch": self.torch.to_json(),
            "limit": self.limit.to_json(),
            "passed": self.passed,
        }


@dataclass(frozen=True, kw_only=True)
class Departure:
    """The first place in a graph whose value leaves the module's: a layer and its last node."""

    layer: str
    node: str
    operator: str
    relative_l2: float
    limit: float

    def __str__(self) -> str:
        return (
            f"first off at {self.layer} (node {self.node}, {self.operator}): relative L2 "
            f"{self.relative_l2:.2g}, at most {self.limit:.2g}"
        )

    def to_json(self) -> Json:
        """Return everything, fit for strict JSON."""
        return {
            "layer": self.layer,
            "node": self.node,
            "operator": self.operator,
            "relative_l2": jsonable(self.relative_l2),
            "limit": jsonable(self.limit),
        }


@dataclass(frozen=True, kw_only=True)
class Result:
    """One artefact in one runner.

    Attributes:
        artefact: the file's name, or "merged model".
        runner: engine and device.
        precision: what it was judged as.
        checks: one per output and case; empty if it did not run.
        update: by output the share of the fine-tune's effect that is present: 1 at the merged
            model's outputs, 0 at the base's.
        unseen: it ran, and its precision rounds away every difference between merged model and
            base, so that nothing tells which of them it computes.
        error: why it did not run, or why it broke.
        broken: `error` is the artefact's fault, not the machine's.
        departure: the layer where it first leaves the merged model, if that could be found.
    """

    artefact: str
    runner: str
    precision: str
    checks: tuple[Check, ...] = ()
    update: Mapping[str, float] = field(default_factory=dict)
    unseen: bool = False
    error: KiloDeltaError | None = None
    broken: bool = False
    departure: Departure | None = None

    @property
    def status(self) -> str:
        """One of `STATUSES`."""
        if self.error is not None:
            return FAILED if self.broken else NOT_RUN
        return FAILED if self.reasons() else PASSED

    @property
    def fix(self) -> str:
        """What to do if it failed."""
        if self.error is not None:
            return self.error.fix
        if self._overwhelmed():
            return "export --dtype fp32, or bf16, which has the range of float32"
        if self.unseen:
            return "give more inputs of the task, or export a finer precision"
        return "export again from the merged model"

    def reasons(self) -> tuple[str, ...]:
        """Return every reason why it failed, worst case first within an output."""
        if self.error is not None:
            return (self.error.what,)
        late = [check for check in self.checks if not check.passed]
        return (*map(_excess, late), *self._overwhelmed(), *self._absent())

    def _overwhelmed(self) -> list[str]:
        """Give a reason for each failed output on which torch itself is lost in this precision."""
        late = {check.output: check for check in self.checks if not check.passed}
        return [
            f"{self.precision} does not carry the model: plain torch in it is off by "
            f"{max(c.torch.relative_l2, c.torch.relative_max):.2g} on {output} itself"
            for output in late
            for c in [_worst([c for c in self.checks if c.output == output])]
            if not carries([c.torch])
        ]

    def _absent(self) -> list[str]:
        if self.unseen:
            return [
                f"in {self.precision}, rounding is coarser than what the fine-tune changes on these"
                " inputs, so nothing shows whether the update is present"
            ]
        return [
            f"{output}: {share:.0%} of the update's effect is present: these are the base's outputs"
            for output, share in self.update.items()
            if share <= NEARER_BASE
        ]

    def to_json(self) -> Json:
        """Return everything, fit for strict JSON."""
        return {
            "artefact": self.artefact,
            "runner": self.runner,
            "precision": self.precision,
            "status": self.status,
            "reasons": list(self.reasons()),
            "departure": self.departure.to_json() if self.departure else None,
            "update": {name: jsonable(share) for name, share in self.update.items()},
            "checks": [check.to_json() for check in self.checks],
        }


def _worst(checks: list[Check]) -> Check:
    return max(checks, key=lambda check: max(check.torch.relative_l2, check.torch.relative_max))


def _excess(check: Check) -> str:
    shape = "x".join(map(str, check.shape))
    return (
        f"{check.output} at the {check.case} shape {shape}: relative L2 "
        f"{check.error.relative_l2:.2g} (at most {check.limit.relative_l2:.2g}), relative maximum "
        f"{check.error.relative_max:.2g} (at most {check.limit.relative_max:.2g})"
    )


@dataclass(frozen=True, kw_only=True)
class Closeness:
    """Means over rows, defined as in `Metrics`; `top1` and `kl` are None without class scores."""

    top1: float | None
    cosine: float
    kl: float | None

    def to_json(self) -> Json:
        """Return the numbers by name."""
        return {"top1": self.top1, "cosine": self.cosine, "kl": jsonable(self.kl)}


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """One output of the merged model and of the base against the tuned model's, over all inputs."""

    output: str
    rows: int
    merged: Closeness
    base: Closeness

    def to_json(self) -> Json:
        """Return everything, fit for strict JSON."""
        return {
            "output": self.output,
            "rows": self.rows,
            "merged": self.merged.to_json(),
            "base": self.base.to_json(),
        }
