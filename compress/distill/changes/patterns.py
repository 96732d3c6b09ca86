"""Few short globs for many names: a hundred layers cost the manifest a dozen characters."""

from __future__ import annotations

from collections.abc import Sequence

from kilodelta.format.targets import matches


def patterns_for(chosen: Sequence[str], others: Sequence[str]) -> tuple[str, ...]:
    """Find few short globs that match all chosen names and none of the others.

    Args:
        chosen: names to match.
        others: names not to match.

    Example:
        >>> patterns_for(["h.0.q.weight", "h.1.q.weight"], ["h.0.k.weight", "wte.weight"])
        ('h.*.q.*',)
    """
    left, globs = set(chosen), []
    candidates = sorted({glob for name in chosen for glob in _generalised(name)}, key=len)
    reach = {
        glob: {name for name in chosen if matches(name, (glob,))}
        for glob in candidates
        if not any(matches(name, (glob,)) for name in others)
    }
    while left:
        best = max(reach, key=lambda glob: (len(reach[glob] & left), -len(glob)))
        globs.append(best)
        left -= reach[best]
    return tuple(sorted(globs))


def _generalised(name: str) -> list[str]:
    """Ways to generalise a name: any front, any end, any layer number."""
    parts = name.split(".")
    numbered = ["*" if part.isdigit() else part for part in parts]
    fronts = [".".join(parts[:n]) + ".*" for n in range(1, len(parts))]
    ends = ["*." + ".".join(parts[-n:]) for n in range(1, len(parts))]
    masked = [".".join(numbered[:n]) + ".*" for n in range(1, len(parts))]
    both = [
        f"{'.'.join(parts[:n])}.*.{'.'.join(parts[-m:])}"
        for n in range(1, len(parts))
        for m in range(1, len(parts) - n)
    ]
    return [name, ".".join(numbered), *fronts, *ends, *masked, *both]
