"""Let runtimes write greedily: ONNX Runtime step by step, and ONNX Runtime GenAI by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kilodelta.errors import KiloDeltaError, MissingPackageError, ProofError, one_line
from kilodelta.export.decoder.genai import CONFIG
from kilodelta.models import Batch
from kilodelta.models.generation.cache import PAST, POSITIONS, as_past
from kilodelta.verify.runners.runner import UnavailableError


@dataclass(frozen=True, kw_only=True)
class Written:
    """A text that a runtime has written.

    Attributes:
        fed: the tokens that were computed: the prompt, and what was written but for the last.
        start: how many of them are the prompt.
        chosen: the tokens that were written; an end token, if one was, included.
        logits: `(fed, vocabulary)`, the scores after every token.
    """

    fed: tuple[int, ...]
    start: int
    chosen: tuple[int, ...]
    logits: NDArray[Any]


class Writer(Protocol):
    """One way to continue prompts with a cache."""

    @property
    def name(self) -> str:
        """The runtime, such as `onnxruntime-cpu`."""

    def available(self) -> KiloDeltaError | None:
        """Return None if `write` will work here, else what is missing.

        Raises:
            ProofError: the artefact itself is broken.
        """

    def write(self, ids: Sequence[int], most: int, end: Sequence[int]) -> Written:
        """Continue a prompt, always by the most likely token, until an end token or `most`.

        Raises:
            ProofError: the runtime stops.
        """


def open_session(path: Path) -> Any:
    """Open an `onnxruntime.InferenceSession` on the CPU, or return the error that says why not.

    Raises:
        ProofError: the file is no valid model.
    """
    try:
        import onnxruntime
    except ImportError:
        return MissingPackageError(
            "onnxruntime is needed to run ONNX models",
            fix="in a clone of kilodelta: pip install '.[cpu]'",
        )
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4  # what fails is raised as well
    try:
        return onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's own classes share no other base
        if "NOT_IMPLEMENTED" in str(error):  # no kernel of this precision, as for bfloat16
            return UnavailableError(
                f"ONNX Runtime cannot run it on a CPU: {one_line(error)}",
                fix="run it on a GPU, or export --dtype fp32",
            )
        raise ProofError(
            f"{path.name} is not a valid model: {one_line(error)}",
            fix="export again, or fetch the file again",
        ) from error


def write_greedily(
    step: Callable[[Sequence[int], int], NDArray[Any]],
    ids: Sequence[int],
    most: int,
    end: Sequence[int],
) -> Written:
    """Continue a prompt by the most likely token, until an end token or `most`.

    Args:
        step: takes new tokens and how many there are with those before, and returns the scores
            after each of the new ones, `(new, vocabulary)`.
        ids: the prompt.
        most: how many tokens to write at most.
        end: tokens that end a text.

    Raises:
        ProofError: a step fails.
    """
    fed: list[int] = []
    chosen: list[int] = []
    new, rows = list(ids), []
    while True:
        fed += new
        try:
            rows.append(step(new, len(fed)))
        except Exception as error:  # ONNX Runtime's own classes share no other base
            raise ProofError(
                f"ONNX Runtime stops at token {len(fed)}: {one_line(error)}", fix="export again"
            ) from error
        chosen.append(int(rows[-1][-1].argmax()))
        if chosen[-1] in end or len(chosen) == most:
            break
        new = [chosen[-1]]
    return Written(
        fed=tuple(fed), start=len(ids), chosen=tuple(chosen), logits=np.concatenate(rows)
    )


class OnnxWriter:
    """ONNX Runtime on a CPU, fed token by token.

    Args:
        path: a graph with a cache.
    """

    name = "onnxruntime-cpu"

    def __init__(self, path: Path) -> None:
        self._path = path
        self._session: Any = None

    def available(self) -> KiloDeltaError | None:
        """Open a session; return None, or why there is none; see `Writer`."""
        opened = open_session(self._path)
        if isinstance(opened, KiloDeltaError):
            return opened
        self._session = opened
        return None

    def write(self, ids: Sequence[int], most: int, end: Sequence[int]) -> Written:
        """Continue a prompt; see `Writer`."""
        ports = self._session.get_inputs()
        cache = {p.name: empty_cache_of(p) for p in ports if p.name.startswith(f"{PAST}.")}

        def step(new: Sequence[int], total: int) -> NDArray[Any]:
            nonlocal cache
            logits, cache = self._step(new, total, cache)
            scores: NDArray[Any] = logits[0]
            return scores

        return write_greedily(step, ids, most, end)

    def _step(
        self, new: Sequence[int], total: int, cache: dict[str, Any]
    ) -> tuple[NDArray[Any], dict[str, Any]]:
        given = {
            "input_ids": np.array([new], np.int64),
            "attention_mask": np.ones((1, total), np.int64),
            POSITIONS: np.arange(total - len(new), total, dtype=np.int64)[None],
        }
        taken = {port.name for port in self._session.get_inputs()}
        names = [port.name for port in self._session.get_outputs()]
        batch = {name: array for name, array in given.items() if name in taken}
        made = dict(zip(names, self._session.run(names, {**batch, **cache}), strict=True))
        logits = made.pop("logits")
        return logits, as_past(made)


def empty_cache_of(port: Any) -> NDArray[Any]:
    """Make a cache without positions for an input of a graph, `(1, heads, 0, size)`."""
    kind = np.float16 if "float16" in port.type else np.float32
    return np.zeros((1, port.shape[1], 0, port.shape[3]), kind)


class GenaiWriter:
    """ONNX Runtime GenAI, which makes masks, positions and steps by itself.

    Args:
        folder: holds `genai_config.json`.
        half: whether an encoder there takes float16 instead of float32.
    """

    name = "onnxruntime-genai"

    def __init__(self, folder: Path, *, half: bool = False) -> None:
        self._folder, self._floats = folder, np.float16 if half else np.float32
        self._model: Any = None
        self._package: Any = None

    def available(self) -> KiloDeltaError | None:
        """Open the model; return None, or why it cannot be; see `Writer`."""
        try:
            import onnxruntime_genai
        except ImportError:
            return MissingPackageError(
                f"onnxruntime-genai is needed to run {CONFIG}",
                fix="in a clone of kilodelta: pip install '.[genai]'",
            )
        self._package = onnxruntime_genai
        self._model = self._started(lambda: onnxruntime_genai.Model(str(self._folder)), "load")
        return None

    def write(
        self, ids: Sequence[int], most: int, end: Sequence[int], source: Batch | None = None
    ) -> Written:
        """Continue a prompt, or write of what an encoder reads; see `Writer`.

        Args:
            ids: the prompt, or the tokens that a text begins with.
            most: how many tokens to write at most.
            end: tokens that end a text.
            source: what the encoder reads, one row.

        Raises:
            ProofError: the runtime stops.
        """
        read = {name: tensor.numpy() for name, tensor in (source or {}).items()}
        text: Written = self._started(lambda: self._write(ids, most, end, read), "run")
        return text

    def _started(self, work: Callable[[], Any], verb: str) -> Any:
        try:
            return work()
        except Exception as error:  # all of its errors are RuntimeErrors, or pybind's
            raise ProofError(
                f"ONNX Runtime GenAI does not {verb} {self._folder.name}: {one_line(error)}",
                fix="export again with --kv-cache",
            ) from error

    def _write(
        self, ids: Sequence[int], most: int, end: Sequence[int], read: Mapping[str, NDArray[Any]]
    ) -> Written:
        settings = self._package.GeneratorParams(self._model)
        settings.set_search_options(do_sample=False, max_length=len(ids) + most)
        generator = self._package.Generator(self._model, settings)
        if read:
            encoded = self._package.NamedTensors()
            for name, array in read.items():
                encoded[name] = np.ascontiguousarray(array, self._floats)
            generator.set_inputs(encoded)
        generator.append_tokens(np.array(ids, np.int32))
        rows = [np.array(generator.get_output("logits"))[0]]
        chosen: list[int] = []
        while True:
            generator.generate_next_token()
            chosen.append(int(generator.get_next_tokens()[0]))
            if chosen[-1] in end or len(chosen) == most or generator.is_done():
                break
            rows.append(np.array(generator.get_logits())[0, -1:])  # computes the step
        fed = (*ids, *chosen[:-1])
        return Written(fed=fed, start=len(ids), chosen=tuple(chosen), logits=np.concatenate(rows))
