"""Merge into the grid of an ONNX graph: codes are replaced, and nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kilodelta.errors import InputError, require
from kilodelta.export.merge.in_grid import Tally, merge_weight, proved_parts
from kilodelta.export.merge.tensor import require_result
from kilodelta.files import staging
from kilodelta.files.identity import Identity
from kilodelta.format.delta import Delta
from kilodelta.grid.model import QuantisedModel
from kilodelta.grid.onnx_graph import every_copy
from kilodelta.grid.onnx_source import OnnxSource
from kilodelta.progress import Meter, Progress


def require_grid_only(delta: Delta, model: QuantisedModel) -> None:
    """Refuse a delta that changes more than codes: a graph's other initializers have other names.

    Args:
        delta: bound to the base.
        model: opened from an `.onnx` file.

    Raises:
        InputError: it has targets that are not quantised, or of which the graph has two copies, or
            stores tensors whole.
    """
    others = [name for name in delta.targets if name not in model.stored]
    others += list(delta.extras)
    if others:
        raise InputError(
            f"the file changes {', '.join(others[:3])}, which {model.path} does not hold as codes",
            fix="merge into the checkpoint, and export that",
        )
    assert isinstance(model.source, OnnxSource)  # the caller opened it
    copies = Counter(weight.name for weight in every_copy(model.source))
    twice = [name for name in delta.targets if copies[name] > 1]
    if twice:
        raise InputError(
            f"{model.path} holds {twice[0]} in {copies[twice[0]]} copies, and a merge writes one",
            fix="merge into the checkpoint, and export that; a device folder in patch mode writes"
            " every copy",
        )


@contextmanager
def staged(place: Path, source: OnnxSource) -> Iterator[Path]:
    """Yield the path to write the graph to, with its external data beside it where it has some."""
    if source.external:
        with staging.new_files(data_of(place), place) as folder:
            yield folder / place.name
    else:
        with staging.new_file(place, replace=False) as stage:
            yield stage


def data_of(place: Path) -> Path:
    """Return where the external data of a merged graph lie."""
    return place.with_name(place.name + ".data")


def write_onnx(
    model: QuantisedModel, stored: Identity, delta: Delta, stage: Path, progress: Progress
) -> Tally:
    """Write the merged graph.

    Args:
        model: the base, opened from an `.onnx` file.
        stored: the identity over its initializers, just proved.
        delta: bound to it; `require_grid_only` holds.
        stage: the new file.
        progress: receives how far the work is, in weights.

    Raises:
        ProofError: the merged targets are not the ones that the delta promises.
    """
    onnx = require("onnx", extra="onnx", why=f"write {stage.name}")
    source = model.source
    assert isinstance(source, OnnxSource)  # the caller looked
    tally, digests = Tally(), {}
    total = sum(a * b for a, b in (model.of(name).shape for name in delta.targets))
    meter = Meter("merge", total, "weights", progress)
    for name in delta.targets:
        parts = proved_parts(model, stored, name)
        packed, digests[name] = merge_weight(delta, model, name, parts, tally)
        source.replace(model.of(name).codes, packed.data.tobytes())
        meter.add(model.of(name).shape[0] * model.of(name).shape[1])
    require_result(delta, digests)
    external = {
        "save_as_external_data": True,
        "all_tensors_to_one_file": True,
        "location": data_of(stage).name,
        "size_threshold": 0,  # so that the file is there, however small the weights
    }
    onnx.save(source.model, stage, **(external if source.external else {}))
    return tally
