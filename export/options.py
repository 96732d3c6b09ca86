"""What `kilodelta export` is asked for, checked and in the library's own terms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from kilodelta.errors import InputError
from kilodelta.export.manifest.facts import Sizes
from kilodelta.export.tensorrt.flavour import AUTO
from kilodelta.files.dtypes import PRECISIONS
from kilodelta.merging.quantised import MIN_CHANGED

SHORT: Mapping[str, str] = MappingProxyType({row.short: row.long for row in PRECISIONS.values()})
"""Precisions as file names and the command line write them."""


def short(dtype: str) -> str:
    """Return a precision as file names write it.

    Example:
        >>> short("float16")
        'fp16'
    """
    return PRECISIONS[dtype].short


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to export, and how; `kilodelta.export.export` explains each in full.

    Attributes:
        onnx: keep the ONNX files; engines are built from them either way.
        capabilities: GPUs to build an engine for, such as `("sm86", "sm89")`.
        dtypes: precisions, such as "float32".
        external: put weights beside the ONNX file.
        flavour: which TensorRT.
        sizes: smallest, usual and largest size of axes by name; others follow from the model.
        tf32: let an engine take float32 products in TF32.
        refittable: let the delta's tensors be exchanged in the engine later.
        model: `package.module:function` that builds the module.
        config: a folder with the tuned model's config.json.
        inputs: a batch to trace with.
        outputs: names or globs of the outputs to export.
        max_work: the most operations that the file may ask for; by default what suits the base.
        kv_cache: export a causal language model with its cache, for ONNX Runtime GenAI, or the
            decoder of an encoder-decoder with its.
        served: the artefacts go into a Triton repository as well.
        blocks: the operators that hold codes of a quantised base (`export.quantised.graph.FORMS`).
        min_changed: the share of a quantised base's codes that the merge has to change.
        force: replace an earlier export.
    """

    onnx: bool = True
    capabilities: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ("float32",)
    external: bool = False
    flavour: str = AUTO
    sizes: Mapping[str, Sizes] = field(default_factory=dict)
    tf32: bool = False
    refittable: bool = False
    model: str | None = None
    config: str | None = None
    inputs: str | None = None
    outputs: tuple[str, ...] = ()
    max_work: float | None = None
    kv_cache: bool = False
    served: bool = False
    blocks: str = "auto"
    min_changed: float = MIN_CHANGED
    force: bool = False


_MOST = (1 << 31) - 1  # TensorRT counts in 32 bits where a shape is an index


def read_sizes(texts: Sequence[str]) -> dict[str, Sizes]:
    """Read sizes of axes as a user writes them: `batch=1,8,32`.

    Raises:
        InputError: a text of another form, or sizes that do not rise.

    Example:
        >>> read_sizes(["batch=1,8,32"])
        {'batch': (1, 8, 32)}
    """
    found: dict[str, Sizes] = {}
    for text in texts:
        name, _, numbers = text.partition("=")
        sizes = tuple(int(n) if n.isdecimal() else 0 for n in numbers.split(","))
        rises = len(sizes) == 3 and 1 <= sizes[0] <= sizes[1] <= sizes[2] <= _MOST
        if not rises or name in found:
            raise InputError(
                f"{text!r} is no profile of an axis",
                fix="give each axis once, as in batch=1,8,32: smallest, usual, largest",
            )
        found[name] = (sizes[0], sizes[1], sizes[2])
    return found


def listed(names: str | Sequence[str]) -> tuple[str, ...]:
    """Return names as a tuple; a text alone is one name, not its letters.

    Example:
        >>> listed("sm86"), listed(["sm86", "sm89"])
        (('sm86',), ('sm86', 'sm89'))
    """
    return (names,) if isinstance(names, str) else tuple(names)


def read_dtypes(names: Sequence[str]) -> tuple[str, ...]:
    """Read precisions as the command line writes them, each once.

    Raises:
        InputError: a name that is none of them.

    Example:
        >>> read_dtypes(["fp16", "fp32", "fp16"])
        ('float16', 'float32')
    """
    unknown = [name for name in names if name not in SHORT]
    if unknown or not names:
        raise InputError(
            f"{', '.join(unknown) or 'nothing'} is no precision to export in",
            fix=f"give {', '.join(SHORT)}",
        )
    return tuple(dict.fromkeys(SHORT[name] for name in names))
