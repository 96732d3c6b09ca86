"""Say in one line whether a result is good, and what to do next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

Level = Literal["green", "amber", "red"]
GREEN: Final = "green"
AMBER: Final = "amber"
RED: Final = "red"
WORDS = {GREEN: "good", AMBER: "look twice", RED: "not good"}
"""The colours in words, for who cannot see them."""
KEPT_GREEN = 0.9
"""Share of the way from the base to the tuned model from which a result is called good.

A full fine-tune that is trained again from another seed agrees with the first one on about as many
inputs (0.9 to 0.95 of the gain on the sets in docs/numbers.md), so more cannot be told from noise.
"""
KEPT_AMBER = 0.6
"""Share below which most users would notice: less than two thirds of what was learned is kept."""
FAR = 20.0
"""Weight error from which a poor result is more likely overshot than short of bytes.

DINOv2 fine-tuned on 160 images, 25 KB, 100 steps: 51 at the method's rate, which kept 16 % of the
gain; 4.4 at a fifth of it, which kept 50 %.
"""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A result's colour, what it means in a sentence, and what to do next (empty if nothing)."""

    level: Level
    text: str
    advice: str = ""

    def to_json(self) -> dict[str, str]:
        """Return plain JSON values."""
        return {"level": self.level, "text": self.text, "advice": self.advice}


def kept_share(base: float, delta: float, tuned: float = 1.0) -> float | None:
    """Return how much of the way from the base's figure to the tuned model's was gone.

    1 is the tuned model's figure, 0 the base's, less than 0 is worse than the base. None where the
    base already has the tuned model's figure, so that nothing could be gained.
    """
    gain = tuned - base
    return None if abs(gain) < 1e-9 else (delta - base) / gain


def of_share(share: float, what: str, *, advice: str) -> Verdict:
    """Judge a share of the gain; `what` says of which gain, `advice` what raises it."""
    percent = f"{100 * share:.0f} %"
    if share < 0:
        return Verdict(
            level=RED,
            text=f"worse than the base model: {what}",
            advice="check that base and tuned are not swapped; then " + advice,
        )
    if share >= KEPT_GREEN:
        return Verdict(level=GREEN, text=f"keeps {percent} of {what}")
    level: Level = AMBER if share >= KEPT_AMBER else RED
    return Verdict(level=level, text=f"keeps only {percent} of {what}", advice=advice)


def verdict_of(report: Mapping[str, Any]) -> Verdict:
    """Judge what `kilodelta compress --json` or `kilodelta verify --json` printed.

    Args:
        report: the parsed JSON of either command.

    Example:
        >>> from kilodelta.report import verdict_of
        >>> verdict_of({"before": {"agreement": 0.5}, "after": {"agreement": 0.98}}).level
        'green'
    """
    if "after" in report:
        return _of_compress(report)
    return _of_verify(report)


def _of_compress(report: Mapping[str, Any]) -> Verdict:
    advice = "raise --budget or --steps, or give more inputs"
    if float(report.get("weight_error") or 0) >= FAR:
        advice = (
            "give a lower --lr, or --tune MINUTES: the update lies "
            f"{report['weight_error']:.0f} times as far from the tuned weights as the base does"
        )
    if report.get("interrupted"):
        return Verdict(
            level=AMBER,
            text="interrupted: the best state so far",
            advice="run the same command with --resume",
        )
    before, after = report.get("before"), report.get("after")
    if before is None or after is None:
        return Verdict(
            level=AMBER,
            text="fitted without inputs: nothing was run, so nothing is known of its outputs",
            advice="give --inputs, or compare with kilodelta verify --inputs --against",
        )
    share = kept_share(float(before["agreement"]), float(after["agreement"]))
    if share is None and float(after["agreement"]) < 1:
        return Verdict(
            level=RED,
            text="worse than the base model, which agrees with the tuned one on all held-out inputs"
            f" (this file: {after['agreement']:.3f})",
            advice="give inputs on which the fine-tune makes a difference; then " + advice,
        )
    if share is None:
        return Verdict(
            level=AMBER,
            text="the base already agrees with the tuned model on every held-out input",
            advice="give inputs on which the fine-tune makes a difference",
        )
    what = (
        "the way from the base to the tuned model "
        f"(agreement {before['agreement']:.3f} -> {after['agreement']:.3f} on held-out inputs)"
    )
    return of_share(share, what, advice=advice)


def _of_verify(report: Mapping[str, Any]) -> Verdict:
    if not report.get("passed", False):
        return Verdict(
            level=RED,
            text=report.get("failure") or report.get("error") or "not every check passed",
            advice=report.get("fix") or "the table below names what is off",
        )
    results = report.get("results")
    if results is None:
        return Verdict(
            level=GREEN,
            text="every digest is as promised",
            advice="give --inputs to compare what the artefacts compute",
        )
    ran = sum(r["status"] == "passed" for r in results)
    silent = sum(r["status"] == "not run" for r in results)
    text = f"{ran} of {len(results)} runs compute the merged model within their limits"
    advice = f"{silent} could not run on this machine; the table says what each needs"
    return Verdict(level=GREEN, text=text, advice=advice if silent else "")
