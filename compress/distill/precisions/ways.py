"""Let a student compute, in training, as each asked-for precision will: way after way."""

from __future__ import annotations

from torch import Tensor, nn

from kilodelta.compress.distill.job import Job
from kilodelta.compress.distill.precisions.grids import Grids
from kilodelta.compress.distill.precisions.wishes import BESIDE, IN_GRID, beside
from kilodelta.compress.training import train
from kilodelta.compress.training.attachment import Attachment
from kilodelta.compress.training.layers import takes_grid
from kilodelta.compress.training.through_grid import TargetGrid, Way, Ways
from kilodelta.errors import InputError
from kilodelta.files.tensor import RawTensor
from kilodelta.grid.precisions import PRECISIONS
from kilodelta.models.weights import values

START = 0.15
"""The size of the updates at the start of a training for a merge in the grid, in its steps."""


def train_for(job: Job, grids: Grids) -> None:
    """Give the attached student the ways that it trains for; `Ways.at` says which step takes which.

    A quantised precision of a float base is two ways: merged in the grid, and beside the quantised
    base. Float precisions are one, the base as it is.

    Args:
        job: what is trained, its student attached.
        grids: the base's weights on the grids that were asked for.

    Raises:
        InputError: a target's layer cannot compute with a weight on a grid.
    """
    assert job.pair.student is not None  # the caller has looked
    attachment = train.attached(job.pair.student.module)
    ways: list[Way] = []
    for name in job.precisions:
        if name == BESIDE:
            ways.append(Way(name=name))
        elif name == IN_GRID:
            ways.append(Way(name=name, grids=_grids(attachment, grids, name)))
        elif name in PRECISIONS:
            weights = _weights(job, grids, name)
            on_grid = _grids(attachment, grids, name)
            ways.append(Way(name=name, weights=weights, grids=on_grid))
            ways.append(Way(name=beside(name), weights=weights))
        elif not any(way.name == "float" for way in ways):
            ways.append(Way(name="float"))
    attachment.ways = Ways(tuple(ways))
    if IN_GRID in job.precisions:
        attachment.start_on_grid(START)


def _grids(attachment: Attachment, grids: Grids, name: str) -> dict[int, TargetGrid]:
    matrices, found = grids.matrices(name), {}
    for place in attachment.places:
        matrix = matrices.get(place.target.name)
        if matrix is None:
            continue
        for site in place.sites:
            if not takes_grid(site):
                raise InputError(
                    f"{place.target.name} belongs to a {type(site.owner).__name__}, which is not"
                    " trained through a grid",
                    fix="exclude it, or ask --for beside or a float precision",
                )
        found[place.target.index] = TargetGrid.of(matrix, place.parameter.device)
    return found


def _weights(job: Job, grids: Grids, name: str) -> dict[nn.Parameter, Tensor]:
    assert job.pair.student is not None  # the caller has looked
    parameters = dict(job.pair.student.module.named_parameters(remove_duplicate=False))
    found = {}
    for weight, matrix in grids.matrices(name).items():
        parameter = parameters.get(job.pair.names.get(weight, ""))
        if parameter is not None:
            floats = values(RawTensor.of(matrix.values().astype("float32")))
            found[parameter] = floats.to(parameter.device, parameter.dtype)
    return found
