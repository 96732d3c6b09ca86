"""Decide whether a graph with factor inputs can take a delta, before anything is expanded."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from kilodelta.errors import BaseMismatchError, InputError
from kilodelta.export.adapter.layout import AdapterLayout, StoredInput
from kilodelta.files.floats import castable
from kilodelta.files.tensor import RawTensor, TensorInfo
from kilodelta.format.delta import Delta
from kilodelta.format.targets import Target, select
from kilodelta.merging.quantised import require_same_numbers

SHOWN = 5
"""Tensors named in one error."""


def fit(delta: Delta, layout: AdapterLayout) -> Delta:
    """Bind a delta to a graph's base, if the graph can take it.

    Args:
        delta: needs no base: the layout says what its targets are.
        layout: of the graph.

    Raises:
        BaseMismatchError: the graph was made of another base.
        InputError: the method is of full rank, the rank is higher than the graph's, the delta
            changes what is not exposed, or its extras are not the graph's stored tensors.
        FileError: the coefficients break the exactness bound.
    """
    base = delta.manifest.base
    if layout.grid is not None:
        require_same_numbers(layout.grid, delta.manifest, "the graph")
    elif base.root != layout.base_root:
        raise BaseMismatchError(
            f"the graph was made of the base {layout.base_root} ({layout.base_name or 'unnamed'}); "
            f"the file is for {base.root} ({base.name or 'unnamed'})",
            fix="give a file made for the graph's base, or export the graph from the file's",
        )
    _require_low_rank(delta, layout)
    _require_stored(delta, layout)
    exposed = [tensor.info for tensor in layout.exposed]
    targets = _require_exposed(delta, exposed)
    _require_alike(targets, layout)
    return delta if delta.layout == targets else delta.bind_to(exposed)


def too_high(rank: int, layout: AdapterLayout) -> InputError:
    """Return the error of a delta whose rank the graph does not take."""
    return InputError(
        f"the file has rank {rank}, the graph takes up to {layout.rank}",
        fix=f"make the graph anew, for a device by kilodelta bundle --rank {rank}, else by "
        f"export-adapter --rank {rank}; or merge the file",
    )


def _require_low_rank(delta: Delta, layout: AdapterLayout) -> None:
    form = delta.form
    if form.full_rank:
        raise InputError(
            f"a {form.name} update has full rank; the graph takes low-rank factors",
            fix="apply the file in patch or refit mode, or merge it",
        )
    if form.rank > layout.rank:
        raise too_high(form.rank, layout)


def _require_stored(delta: Delta, layout: AdapterLayout) -> None:
    """See that the extras are tensors that the graph takes whole, and that no head is missing."""
    known = {one.info.name: one for one in layout.stored}
    unknown = [name for name in delta.extras if name not in known]
    if unknown:
        raise InputError(
            f"the file also stores tensors whole, which are no inputs of the graph: "
            f"{_some(unknown)}",
            fix="make the graph anew with --config of the tuned model, where they are a head that "
            f"the base lacks, else with {_options('whole', unknown)}; or apply the file in patch "
            "or refit mode",
        )
    missing = [name for name, one in known.items() if one.is_new and name not in delta.extras]
    if missing:
        raise InputError(
            f"the graph takes a head from each file, and this one brings no {_some(missing)}",
            fix="export a graph without --config for files without a head",
        )
    for name, extra in delta.extras.items():
        if why := _misfit(known[name], extra):
            raise InputError(
                f"{name} is {extra.dtype} {list(extra.shape)} in the file, {why}",
                fix="export the graph with this fine-tune's own --config, or merge the file",
            )


def _misfit(stored: StoredInput, extra: RawTensor) -> str:
    """Why a stored tensor cannot be fed; empty if it can, or if nothing depends on it."""
    if not stored.is_used:
        return ""
    if not stored.takes(extra.shape):
        shape = list(stored.info.shape)
        return f"the graph's is {['any', *shape[1:]] if stored.is_free else shape}"
    wanted = stored.info.dtype
    return "" if castable(extra.dtype, wanted) else f"the graph's is {wanted}"


def _require_exposed(delta: Delta, exposed: list[TensorInfo]) -> tuple[Target, ...]:
    """Return the targets. Patterns matched against the exposed tensors, which are some of the
    base's, match no more than the targets: an equal count proves that all targets are exposed."""
    patterns = delta.manifest.patterns
    matched = select(exposed, patterns)
    if len(matched) != delta.manifest.count:
        raise InputError(
            f"the graph exposes {len(matched)} of the {delta.manifest.count} tensors that the file "
            f"changes: {', '.join(patterns.include)}",
            fix=f"make the graph anew with {_options('targets', patterns.include)}, which exposes "
            "all of them, or apply in patch or refit mode",
        )
    return matched


def _require_alike(targets: Sequence[Target], layout: AdapterLayout) -> None:
    """See that a stack of matrices is one to the file and to the graph, or to neither."""
    stacks = {tensor.info.name for tensor in layout.exposed if tensor.use == "stack"}
    unused = {tensor.info.name for tensor in layout.exposed if tensor.use == "unused"}
    for target in targets:
        if target.tensor in unused or (target.part is None) == (target.tensor not in stacks):
            continue
        each, whole = "a matrix for each expert", "one matrix"
        ours, theirs = (whole, each) if target.part is None else (each, whole)
        raise InputError(
            f"{target.tensor} is {ours} to the file, and {theirs} to the graph",
            fix="apply the file in patch or refit mode, or merge it",
        )


def _options(name: str, values: Sequence[str]) -> str:
    """Write values as they are typed: the option is repeated."""
    return " ".join(f"--{name} {shlex.quote(value)}" for value in values)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
