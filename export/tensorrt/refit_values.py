"""What an engine's refittable weights are under a delta: merged, stored whole, or the base's."""

from __future__ import annotations

from kilodelta import parallel
from kilodelta.errors import ExportError
from kilodelta.export.merge.tensor import (
    changed_names,
    merged_tensor,
    require_result,
    rounded,
)
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.files.dtypes import nbytes
from kilodelta.files.floats import castable
from kilodelta.files.identity import raw_digest
from kilodelta.files.tensor import Bytes, RawTensor
from kilodelta.format.delta import Delta
from kilodelta.progress import Meter, Progress


class RefitValues:
    """A fine-tune's weights by name, computed and proved at once.

    Args:
        delta: bound to its base.
        base: a checkpoint with at least the delta's targets.

    Raises:
        CheckpointError: `base` lacks a target.
        ProofError: the merged targets are not the ones that the delta promises.
    """

    def __init__(
        self, delta: Delta, base: Checkpoint, *, threads: int | None, progress: Progress
    ) -> None:
        names = changed_names(delta)
        sizes = {n: base.info(n).nbytes for n in delta.targets}
        sizes |= {n: extra.data.size for n, extra in delta.extras.items()}
        meter = Meter("expand", sum(sizes.values()), "B", progress)

        def work(name: str) -> RawTensor:
            tensor = merged_tensor(delta, name, base.data)
            meter.add(sizes[name])
            return tensor

        made = parallel.run(work, names, meter, weight=lambda n: sizes[n], threads=threads)
        self._base, self._tuned = base, dict(zip(names, made, strict=True))
        require_result(delta, {n: raw_digest(n, self._tuned[n]) for n in delta.targets})

    def get(self, name: str, dtype: str, count: int) -> Bytes:
        """Return a weight's raw bytes, as an engine holds it.

        Args:
            name: of the weight.
            dtype: the engine's, by its safetensors name.
            count: the engine's number of elements.

        Returns:
            uint8 (n,).

        Raises:
            ExportError: it does not fit the engine.
            CheckpointError: nothing of that name is known.
        """
        tensor = self._tuned.get(name) or self._base.raw(name)
        if not castable(tensor.dtype, dtype) or nbytes("U8", tensor.shape) != count:
            raise ExportError(
                f"{name} is {tensor.dtype} {tensor.shape}, the engine's has {count} of {dtype}",
                fix="give the engine of this base, or a delta without that extra tensor",
            )
        return rounded(name, tensor, dtype)
