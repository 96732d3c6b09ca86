"""Refit mode: give a built TensorRT engine the weights of a fine-tune.

The weights are the base's from disk plus the delta, proved before the engine is touched, never the
last fine-tune's. Every refittable weight is set every time, so nothing of an earlier delta stays.
Source: https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/refitting-engines.html
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kilodelta.errors import CheckpointError, ExportError, require
from kilodelta.exact.selftest import require_good_kernels
from kilodelta.export.merge.tensor import changed_names
from kilodelta.export.tensorrt.flavour import CLASSIC, EXTRAS
from kilodelta.export.tensorrt.log import logger
from kilodelta.export.tensorrt.refit_weights import DeviceStream, TunedWeights, hand_over
from kilodelta.files import staging
from kilodelta.files.baseline import require_base
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.format.delta import Delta
from kilodelta.format.file import load
from kilodelta.progress import Progress, silent

GEMM_BIAS = (
    "TensorRT 11.3 can drop the bias of a matrix product in a refittable engine (a known issue in "
    "its release notes): run the parity check on this engine, or use 11.4"
)


@dataclass(frozen=True, kw_only=True)
class Refitted:
    """What a refit did.

    Attributes:
        result: the proved root of the merged targets.
        weights: all refittable weights; those that the delta leaves alone have the base's values.
        unused: changed tensors that the model's outputs do not depend on.
        warnings: what is known against refitting with this TensorRT.
    """

    result: str
    weights: tuple[str, ...]
    unused: tuple[str, ...]
    warnings: tuple[str, ...]


class RefitEngine:
    """An engine on this machine's GPU whose weights follow one delta after another.

    No inference may be under way during a refit.

    Args:
        path: the engine, built with the base's weights and `refit=` (`build.py`).
        base: the base checkpoint, or one with only the engine's refittable weights.
        flavour: "tensorrt" or "tensorrt_rtx".
        unused: tensors that the outputs do not depend on (`Template.unused`).

    Attributes:
        engine: the `ICudaEngine`; another object after `reset` and after a failed refit.
        result: the root of the delta in effect; None for the base.

    Raises:
        MissingPackageError: the flavour is not installed.
        ExportError: the engine does not load here, or is not refittable.
        CheckpointError: a file cannot be read.

    Example:
        >>> engine = RefitEngine("m.engine", "base/", flavour="tensorrt")  # doctest: +SKIP
        >>> engine.refit("task.kd").result  # doctest: +SKIP
        'sha256:...'
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        base: str | Path | Checkpoint,
        *,
        flavour: str,
        unused: Iterable[str] = (),
    ) -> None:
        self._trt = require(flavour, extra=EXTRAS[flavour], why="refit engines")
        self._path, self._base = Path(path), Checkpoint.open(base)
        self._unused = frozenset(unused)
        self._runtime = self._trt.Runtime(logger(self._trt))  # has to outlive its engines
        self.result: str | None = None
        self.engine: Any = self._load()

    def refit(
        self,
        delta: str | os.PathLike[str] | Delta,
        *,
        stream: DeviceStream | None = None,
        threads: int | None = None,
        progress: Progress = silent,
    ) -> Refitted:
        """Give the engine a fine-tune's weights.

        Execution contexts of `engine` stay valid, unless this fails.

        Args:
            delta: a `.kd` file or a `Delta`. One that is bound is taken to be the base's; else the
                base, then whole, is proved first.
            stream: put the weights on the device and refit in this stream's order; the memory has
                to stay until the stream is done. By default from host memory, waiting.
            threads: cores to use; all by default.
            progress: called while the base is read and the weights are expanded.

        Raises:
            BaseMismatchError: the delta is for another base; the engine keeps what it had.
            ExportError: a changed tensor is not refittable, and the engine keeps what it had; or
                TensorRT fails, and the engine is loaded anew and has the base's weights.
            ProofError: the weights are not the ones that the delta promises; as before.
        """
        require_good_kernels()
        bound = self._bound(delta, threads, progress)
        logger(self._trt).errors.clear()
        refitter = self._trt.Refitter(self.engine, logger(self._trt))
        names = tuple(refitter.get_all_weights())
        self._require_refittable(bound, names)
        values = TunedWeights(bound, self._base, threads=threads, progress=progress)
        kept = hand_over(self._trt, refitter, values, names, stream)
        self._run(refitter, stream)
        del kept  # TensorRT reads these until it returns
        self.result = bound.manifest.result
        return Refitted(
            result=self.result,
            weights=names,
            unused=tuple(name for name in changed_names(bound) if name not in names),
            warnings=warnings(self._trt),
        )

    def reset(self) -> None:
        """Load the engine anew, with the base's weights.

        Raises:
            ExportError: it does not load any more.
        """
        self.engine, self.result = None, None
        self.engine = self._load()

    def save(self, path: str | os.PathLike[str]) -> int:
        """Write the engine with the weights it has, still refittable, and return its bytes.

        Raises:
            ExportError: TensorRT does not serialize it.
            OutputError: it cannot be written.
        """
        flags = self._trt.SerializationFlag
        config = self.engine.create_serialization_config()
        config.clear_flag(flags.EXCLUDE_WEIGHTS)
        if hasattr(flags, "INCLUDE_REFIT"):  # before 10.14 engines stay refittable by themselves
            config.set_flag(flags.INCLUDE_REFIT)
        plan = self.engine.serialize_with_config(config)
        if plan is None:
            raise self._failed("does not serialize")
        staging.write(Path(path), memoryview(plan))
        return int(plan.nbytes)

    def _load(self) -> Any:
        try:
            plan = self._path.read_bytes()
        except OSError as problem:
            raise CheckpointError(
                f"{self._path} cannot be read: {problem.strerror or problem}", fix="check the path"
            ) from None
        logger(self._trt).errors.clear()
        engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise self._failed("does not load")
        if not engine.refittable:
            raise ExportError(
                f"{self._path} is not refittable",
                fix="export it with `kilodelta export --refittable`",
            )
        return engine

    def _bound(
        self, delta: str | os.PathLike[str] | Delta, threads: int | None, progress: Progress
    ) -> Delta:
        opened = delta if isinstance(delta, Delta) else load(delta)
        if opened.layout is not None:
            return opened
        require_base(self._base, opened.manifest.base, threads=threads, progress=progress)
        return opened.bind(self._base)

    def _require_refittable(self, delta: Delta, names: tuple[str, ...]) -> None:
        wrong = [n for n in changed_names(delta) if n not in names and n not in self._unused]
        if wrong:
            raise ExportError(
                f"{self._path} was not built to take new values for {', '.join(wrong)}",
                fix="build it again with these weights refittable, or apply the file in patch mode",
            )

    def _run(self, refitter: Any, stream: DeviceStream | None) -> None:
        """Refit; a failure may leave half an engine, so that one is thrown away."""
        try:
            done = (
                refitter.refit_cuda_engine()
                if stream is None
                else refitter.refit_cuda_engine_async(stream.address)
            )
        except BaseException:
            self.reset()
            raise
        if not done:
            failure = self._failed("does not refit")  # before loading empties the log
            self.reset()
            raise failure

    def _failed(self, what: str) -> ExportError:
        said = "".join(f"\n  {line}" for line in logger(self._trt).errors) or " it says nothing"
        return ExportError(
            f"{self._trt.__name__} {self._trt.__version__} {what} {self._path}:{said}",
            fix="use the TensorRT and the kind of GPU that the engine was built with",
        )


def warnings(trt: Any) -> tuple[str, ...]:
    """Return what is known against refitting with this TensorRT."""
    affected = trt.__name__ == CLASSIC and trt.__version__.split(".")[:2] == ["11", "3"]
    return (GEMM_BIAS,) if affected else ()
