"""Say what a user should hear of before anything trains: what is dropped, what looks swapped."""

from __future__ import annotations

from collections.abc import Sequence

from kilodelta.compress.distill.changes.compare import Change, energy
from kilodelta.compress.distill.changes.configuration import traces_of_training
from kilodelta.compress.distill.changes.split import Split
from kilodelta.compress.distill.pair import Pair

LOUD = 0.1
"""Share of the change's energy from which it is said loudly that the file does not carry it."""
HEADS = ("classifier.", "score.", "qa_outputs.", "pre_classifier.", "classification_head.")
"""How tensors of heads begin that fine-tuning adds."""


def warnings_for(
    pair: Pair, changes: Sequence[Change], parts: Split, oversized: Sequence[str]
) -> list[str]:
    """Warn of what the file does not carry, and of models that look exchanged.

    Args:
        pair: both models.
        changes: what differs.
        parts: how each change travels.
        oversized: keys of the configuration that are too large to travel.
    """
    found = []
    if pair.note:
        found.append(f"no module was built, tensors are told by their names: {pair.note}")
    if reason := _swapped(pair, changes):
        found.append(f"{reason}: are the two models given in the right order, base first?")
    share = energy(parts.dropped) / max(energy(changes), 1e-60)
    if share > LOUD:
        largest = sorted(parts.dropped, key=lambda change: -change.norm)
        names = ", ".join(change.name for change in largest if not change.is_new)
        found.append(
            f"{share:.0%} of the change is not stored: {_short(names)}; see --targets and --extras"
        )
    new = [change.name for change in parts.dropped if change.is_new]
    if new:
        found.append(f"new tensors are not stored: {_short(', '.join(new))}; see --extras")
    if oversized:
        found.append(f"the configuration travels without {', '.join(oversized)}")
    return found


def _short(names: str, width: int = 200) -> str:
    return names if len(names) <= width else names[: width - 3] + "..."


def _swapped(pair: Pair, changes: Sequence[Change]) -> str:
    """Why base and tuned model look exchanged; empty where nothing does."""
    heads = [n for n in pair.base.names if n.startswith(HEADS) and n not in pair.tuned]
    if heads and not any(change.is_new for change in changes):
        return f"the base holds {_short(', '.join(heads))}, which the tuned model lacks"
    return traces_of_training(pair.base.path, pair.tuned.path)
