"""Where in a base an adapter's modules lie.

An adapter may have been trained on a part of the base (one tower of two), or on a model of which
the base is a part (an encoder below a head). So its module paths are the base's after something is
put before them, or cut off. Every such change whose shapes fit is tried; one must be left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from kilodelta.compress.adapters.architecture import AdaptedArchitecture
from kilodelta.errors import BaseMismatchError, InputError

_SHOWN = 4
"""Places named in an error."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """A change of module paths: the front `cut` off, then `added` put before.

    Both are empty, or end with a dot.

    Example:
        >>> place = Place(cut="", added="vision_model.")
        >>> place.to_model("encoder.layers.0.mlp.fc1")
        'vision_model.encoder.layers.0.mlp.fc1'
        >>> place.to_adapter("text_model.encoder.layers.0.mlp.fc1") is None
        True
    """

    cut: str = ""
    added: str = ""

    def to_model(self, path: str) -> str | None:
        """Return an adapter's path as the base's model has it; None if it lies outside."""
        return self.added + path.removeprefix(self.cut) if path.startswith(self.cut) else None

    def to_adapter(self, path: str) -> str | None:
        """Return a path of the base's model as the adapter has it; None if it lies outside."""
        return self.cut + path.removeprefix(self.added) if path.startswith(self.added) else None

    @property
    def note(self) -> str:
        """Say where in the base the modules were found; empty where they were not moved."""
        if not self.cut and not self.added:
            return ""
        if not self.cut:
            return f"the adapter's modules lie below {self.added.rstrip('.')} in the base"
        return f"the adapter's {self.cut}* is {self.added}* in the base"

    @property
    def option(self) -> str:
        """What `--prefix` says for this place."""
        cut, added = self.cut.rstrip("."), self.added.rstrip(".")
        return f"{cut}={added}" if cut else added


def parse_prefix(text: str) -> Place:
    """Read `--prefix`: a module path to put before the adapter's, or `OLD=NEW` to replace a front.

    Example:
        >>> parse_prefix("bert=encoder.bert")
        Place(cut='bert.', added='encoder.bert.')

    Raises:
        InputError: there is more than one `=`.
    """
    if text.count("=") > 1:
        raise InputError(
            f"--prefix {text!r:.80} has more than one =",
            fix="give a module path to put before the adapter's, or OLD=NEW",
        )
    cut, _, added = text.rpartition("=")
    return Place(cut=_with_dot(cut), added=_with_dot(added))


def _with_dot(path: str) -> str:
    return f"{path.strip('.')}." if path.strip(".") else ""


def find_place(
    paths: tuple[str, ...],
    architecture: AdaptedArchitecture,
    where: Path,
    *,
    weight: Callable[[str, Place], str | None],
    fits: Callable[[str, tuple[int, ...]], bool],
    is_complete: Callable[[Place], bool] = lambda place: True,
    prefix: str = "",
) -> Place:
    """Find the one place in the base where all of an adapter's modules lie.

    Args:
        paths: the adapted modules, as the adapter's keys have them.
        architecture: the base's tensors and their names.
        where: the adapter, for errors.
        weight: names the tensor that a module has at a place; None if the base has none.
        fits: tells whether a module's factors fit a tensor's shape.
        is_complete: tells whether the adapter adapts there all that its configuration targets;
            asked only where the shapes leave more than one place.
        prefix: what the user says, as in `parse_prefix`.

    Raises:
        InputError: the adapter adapts nothing, or it fits in several places.
        BaseMismatchError: it fits nowhere.
    """
    if not paths:
        raise InputError(f"{where} adapts no module", fix="give a trained adapter's folder")
    if prefix:
        return _told(paths, parse_prefix(prefix), architecture, where, weight)
    unmoved = Place()
    if all(weight(path, unmoved) for path in paths):
        return unmoved
    found = _once(_moves(paths, architecture), paths, weight)
    fitting = [place for place in found if _fits(place, paths, architecture, weight, fits)]
    if len(fitting) > 1:
        fitting = [place for place in fitting if is_complete(place)] or fitting
    if len(fitting or found) > 1:
        raise _several(fitting or found, where, architecture)
    if not found:
        raise _nowhere(paths, architecture, where, weight)
    return (fitting or found)[0]


def _told(
    paths: tuple[str, ...],
    place: Place,
    architecture: AdaptedArchitecture,
    where: Path,
    weight: Callable[[str, Place], str | None],
) -> Place:
    for path in paths:
        if weight(path, place) is None:
            raise BaseMismatchError(
                f"{architecture.base.path} has no tensor for {path} of {where} with --prefix"
                f" {place.option!r}: {_looked(path, place)}",
                fix="list the base's tensors: kilodelta digest --tensors",
            )
    return place


def _looked(path: str, place: Place) -> str:
    moved = place.to_model(path)
    if moved is None:
        return f"it does not begin with {place.cut.rstrip('.')}"
    return f"looked for {moved}.weight"


def _moves(paths: tuple[str, ...], architecture: AdaptedArchitecture) -> Iterator[Place]:
    """Yield the fronts that all paths have in common, to cut, and those under which the first path
    is found, to add."""
    first = paths[0].split(".")
    for count in range(1, len(first)):
        cut = ".".join(first[:count]) + "."
        if all(path.startswith(cut) for path in paths):
            yield Place(cut=cut)
    for front in _fronts(paths[0], architecture):
        yield Place(added=front)


def _fronts(path: str, architecture: AdaptedArchitecture) -> Iterator[str]:
    """Yield what stands before a module path in the names of the base's tensors."""
    inner = f".{path}."
    for name in (*architecture.names, *architecture.stacks):
        front, middle, _ = f".{name}".partition(inner)
        if middle and front:
            yield front[1:] + "."


def _once(
    places: Iterable[Place],
    paths: tuple[str, ...],
    weight: Callable[[str, Place], str | None],
) -> list[Place]:
    """Keep the places where every path has a tensor; of those that mean the same, the first."""
    found: dict[tuple[str | None, ...], Place] = {}
    for place in dict.fromkeys(places):
        tensors = tuple(weight(path, place) for path in paths)
        if None not in tensors:
            found.setdefault(tensors, place)
    return list(found.values())


def _fits(
    place: Place,
    paths: tuple[str, ...],
    architecture: AdaptedArchitecture,
    weight: Callable[[str, Place], str | None],
    fits: Callable[[str, tuple[int, ...]], bool],
) -> bool:
    for path in paths:
        name = architecture.names.get(weight(path, place) or "")
        if name is not None and not fits(path, architecture.base.info(name).shape):
            return False
    return True


def _several(places: list[Place], where: Path, architecture: AdaptedArchitecture) -> InputError:
    options = [f"--prefix {place.option}" for place in places]
    more = f" and {len(options) - _SHOWN} more" if len(options) > _SHOWN else ""
    return InputError(
        f"{where} fits in {len(places)} places of {architecture.base.path}, and nothing tells in"
        " which it was trained",
        fix=f"say which: {', '.join(options[:_SHOWN])}{more}",
    )


def _nowhere(
    paths: tuple[str, ...],
    architecture: AdaptedArchitecture,
    where: Path,
    weight: Callable[[str, Place], str | None],
) -> BaseMismatchError:
    missing = next(path for path in paths if weight(path, Place()) is None)
    base = architecture.base.path
    if f"{missing}.weight" in architecture.rebuilt:
        return BaseMismatchError(
            f"transformers computes {missing}.weight, which {where} adapts, from tensors of other"
            f" names or another order in {base}",
            fix="merge the adapter with PEFT (merge_and_unload), save, and run kilodelta compress",
        )
    if f"{missing}.in_proj_weight" in architecture.names:
        return BaseMismatchError(
            f"{where} adapts {missing}, a MultiheadAttention of torch, whose query, key and value"
            " projections are one parameter that PEFT changes outside of any layer",
            fix="merge it with PEFT (merge_and_unload), save, and run kilodelta compress",
        )
    others = (n for n in architecture.names if n.startswith(f"{missing}."))
    packed = next((name for name in others if not name.endswith(".bias")), None)
    if packed is not None:
        return BaseMismatchError(
            f"{base} has no tensor {missing}.weight, which {where} adapts, but {packed}: it is"
            " quantised, or the layer is of a kind that PEFT does not adapt",
            fix="give the base before quantisation; its adapters are the same",
        )
    ways = sorted({f"--prefix {p.option}" for p in _replacements(paths, architecture, weight)})
    return BaseMismatchError(
        f"{base} has no tensor {missing}.weight, which {where} adapts",
        fix="give the base that the adapter was trained on"
        + (f"; if this is it, add {' or '.join(ways[:_SHOWN])}" if ways else ""),
    )


def _replacements(
    paths: tuple[str, ...],
    architecture: AdaptedArchitecture,
    weight: Callable[[str, Place], str | None],
) -> Iterator[Place]:
    """Yield ways to replace a front by another, which are proposed but never taken unasked."""
    first = paths[0].split(".")
    for count in range(1, len(first)):
        cut, rest = ".".join(first[:count]) + ".", ".".join(first[count:])
        if not all(path.startswith(cut) for path in paths):
            return
        for front in dict.fromkeys(_fronts(rest, architecture)):
            place = Place(cut=cut, added=front)
            if all(weight(path, place) for path in paths):
                yield place
                return
