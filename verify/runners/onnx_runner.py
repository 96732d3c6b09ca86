"""Run an ONNX file in ONNX Runtime, on the provider asked for and on no other."""

from __future__ import annotations

import ctypes
import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kilodelta.errors import (
    InputError,
    KiloDeltaError,
    MissingPackageError,
    ProofError,
    one_line,
    require,
)
from kilodelta.files.dtypes import DTYPES, FLOATS, DType
from kilodelta.verify.runners.request import Request
from kilodelta.verify.runners.runner import Arrays, Batch, UnavailableError, feed

# TF32 rounds the factors of float32 products to 11 bits; parity in float32 needs them whole.
PROVIDERS: dict[str, list[Any]] = {
    "cpu": ["CPUExecutionProvider"],
    "cuda": [("CUDAExecutionProvider", {"use_tf32": "0"}), "CPUExecutionProvider"],
}
_EXTRA = {"cpu": "cpu", "cuda": "gpu"}
_FIX = {
    "cpu": "install ONNX Runtime again: every wheel of it has the CPU provider",
    "cuda": "in a clone of kilodelta: pip uninstall -y onnxruntime && pip install '.[gpu]'",
}
_TYPES = {f"tensor({row.onnx.lower()})": row for row in DTYPES.values() if row.onnx}
"""By the name that ONNX Runtime gives a tensor's type."""
_BFLOAT16 = "tensor(bfloat16)"


class OnnxRunner:
    """ONNX Runtime with its default optimisations, which users get.

    Args:
        model: the file, or the bytes of a model.
        device: "cpu" or "cuda".
        folder: where the external data of a model given as bytes lies.
    """

    def __init__(self, model: Path | bytes, *, device: str, folder: Path | None = None) -> None:
        self.name = f"onnxruntime-{device}"
        self._model, self._device, self._folder = model, device, folder
        self._session: Any = None

    def available(self) -> KiloDeltaError | None:
        """Open a session; return None, or why there is none on this provider.

        Raises:
            ProofError: the file itself is not a valid model.
        """
        try:
            self._session = self._session or self._open()
        except (MissingPackageError, UnavailableError) as error:
            return error
        return None

    def run(self, batch: Batch) -> Arrays:
        """Compute the outputs by name, in the file's dtypes; bfloat16 becomes float32.

        Raises:
            InputError: an input's values are not of the type that the file takes.
            ProofError: an input is missing, or the file does not compute these shapes.
            MissingPackageError: ONNX Runtime is not installed.
        """
        feeds, names = self._feeds(batch), self._outputs()
        try:
            values = self._session.run_with_ort_values(names, feeds)
        except Exception as error:
            raise ProofError(
                f"{self.name} cannot compute these inputs: {one_line(error)}",
                fix="give ids of the model's own vocabulary, and shapes that its profile covers",
            ) from error
        return {name: _array(value) for name, value in zip(names, values, strict=True)}

    @contextmanager
    def request(self, batch: Batch) -> Iterator[Request]:
        """Bind a batch on the device and yield a request that computes it as often as asked.

        Outputs stay on the device. ONNX Runtime's CUDA graphs need a session per shape, so the
        request captures none.
        """
        feeds, binding = self._feeds(batch), self._session.io_binding()
        for name, value in feeds.items():
            binding.bind_ortvalue_input(name, value)  # copies it to the device, once
        for name in self._outputs():
            binding.bind_output(name, self._device)
        binding.synchronize_inputs()
        yield Request(
            start=lambda: self._session.run_with_iobinding(binding),
            wait=binding.synchronize_outputs,
        )

    def _feeds(self, batch: Batch) -> dict[str, Any]:
        unavailable = self.available()
        if unavailable is not None:
            raise unavailable
        return {i.name: self._value(batch, i.name, i.type) for i in self._session.get_inputs()}

    def _outputs(self) -> list[str]:
        return [output.name for output in self._session.get_outputs()]

    def _open(self) -> Any:
        ort = require("onnxruntime", extra=_EXTRA[self._device], why="run ONNX models")
        wanted = _first(PROVIDERS[self._device])
        if wanted not in ort.get_available_providers():
            raise UnavailableError(
                f"this ONNX Runtime ({ort.__version__}) has no {wanted}", fix=_FIX[self._device]
            )
        session = self._create(ort)
        assert_provider(session, wanted)
        return session

    def _create(self, ort: Any) -> Any:
        if self._device == "cuda":
            _find_cuda(ort)
        source = self._model if isinstance(self._model, bytes) else str(self._model)
        try:
            return ort.InferenceSession(
                source, self._options(ort), providers=PROVIDERS[self._device]
            )
        except Exception as error:
            # By its name: ONNX Runtime's exceptions are defined in a private module.
            if type(error).__name__ == "NotImplemented":  # no kernel for this operator and dtype
                raise UnavailableError(
                    f"ONNX Runtime on {self._device}: {one_line(error)}",
                    fix="run it on CUDA or in TensorRT, or export float32 or float16",
                ) from None
            raise ProofError(
                f"ONNX Runtime refuses the model: {one_line(error)}",
                fix="export it again; `onnx.checker.check_model` may say more",
            ) from error

    def _options(self, ort: Any) -> Any:
        options = ort.SessionOptions()
        options.log_severity_level = 4  # only fatal: what matters arrives as an exception
        if self._folder is not None:
            options.add_session_config_entry(
                "session.model_external_initializers_file_folder_path", str(self._folder)
            )
        return options

    def _value(self, batch: Batch, name: str, onnx_type: str) -> Any:
        """Return one input as ONNX Runtime's own value, of the type that the file takes."""
        ort = require("onnxruntime", extra=_EXTRA[self._device], why="run ONNX models")
        dtype = _type(name, onnx_type)
        values = feed(batch, name, dtype)
        if onnx_type == _BFLOAT16:
            return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(values, dtype.onnx_number)
        return ort.OrtValue.ortvalue_from_numpy(values)


def assert_provider(session: Any, wanted: str) -> None:
    """Check that a session runs where it was asked to: ONNX Runtime falls back in silence.

    Raises:
        UnavailableError: the session's first provider is not `wanted`.
    """
    got = session.get_providers()
    if not got or got[0] != wanted:
        raise UnavailableError(
            f"ONNX Runtime was asked for {wanted} and took {', '.join(got) or 'nothing'}",
            fix="`kilodelta doctor` lists what CUDA lacks; the version of cuDNN is the usual cause",
        )


def _type(name: str, onnx_type: str) -> DType:
    if onnx_type not in _TYPES:
        raise InputError(
            f"the file takes {name} as {onnx_type}, which cannot be given",
            fix="export a model whose inputs are tensors of numbers",
        )
    return _TYPES[onnx_type]


def _first(providers: list[Any]) -> str:
    head = providers[0]
    return str(head[0] if isinstance(head, tuple) else head)


def _find_cuda(ort: Any) -> None:
    """Load CUDA and cuDNN from pip's nvidia packages, where ONNX Runtime does not look itself."""
    if hasattr(ort, "preload_dlls"):
        with redirect_stdout(io.StringIO()):  # it prints what it does not find
            ort.preload_dlls()


def _array(value: Any) -> NDArray[Any]:
    """Return an output in host memory as numpy; bfloat16, which numpy lacks, as equal float32."""
    if value.data_type() != _BFLOAT16:
        array: NDArray[Any] = value.numpy()
        return array
    # numpy() refuses bfloat16, so the words are copied from the value's memory.
    words = np.empty(value.shape(), dtype=np.uint16)
    ctypes.memmove(words.ctypes.data, value.data_ptr(), words.nbytes)
    return FLOATS["BF16"].widen(words)
