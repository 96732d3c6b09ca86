"""What a device folder is to be: options of `kilodelta bundle`, checked before any work.

Nothing here needs torch or TensorRT, so a slip is answered at once, in a fleet's file as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kilodelta.device.folder.bundle import CEILINGS, MAX_JUMP, MAX_KEEP, MODES
from kilodelta.errors import InputError
from kilodelta.export.manifest.facts import FLAVOURS, Sizes
from kilodelta.export.options import SHORT, read_sizes
from kilodelta.export.quantised.graph import settled
from kilodelta.export.tensorrt.flavour import AUTO, RTX

PROVIDERS = ("cpu", "cuda")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to deploy, checked and in the library's own terms.

    Attributes:
        mode: "adapter", "patch" or "refit".
        dtype: "float32", "float16" or "bfloat16".
        keep_onnx: keep the ONNX file that an engine was built from.
        capabilities: GPUs to build an engine for, such as "sm89"; empty for ONNX Runtime.
        flavour: which TensorRT.
        provider: where ONNX Runtime runs: "cpu" or "cuda".
        rank, slots: of the graph in adapter mode.
        include, exclude: globs of the tensors that fine-tunes may change.
        whole: globs of the tensors that fine-tunes may bring whole, in adapter mode.
        config: where the fine-tunes' architecture is stated, or None for the base's own.
        sizes: of axes, by name.
        model: `package.module:function` that builds the module, or None.
        name: the base's name, for messages.
        probe: where golden inputs come from, or None to make them up.
        outputs: names or globs of the outputs to serve; empty for all.
        keep, ceiling, max_jump, max_work: as the bundle states them.
        blocks: the operators that hold a quantised base's codes (`export.quantised.graph.FORMS`).
    """

    mode: str
    dtype: str
    keep_onnx: bool
    capabilities: tuple[str, ...]
    flavour: str
    provider: str
    rank: int
    slots: int
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    whole: tuple[str, ...]
    config: str | None
    sizes: Mapping[str, Sizes]
    model: str | None
    name: str
    probe: str | None
    outputs: tuple[str, ...]
    keep: int
    ceiling: float
    max_jump: int
    max_work: float | None
    blocks: str = "auto"


def settings_from(
    *,
    mode: str,
    onnx: bool = False,
    engine: Sequence[str] = (),
    flavour: str = AUTO,
    provider: str = PROVIDERS[0],
    dtype: str = "fp32",
    rank: int = 8,
    slots: int = 0,
    targets: Sequence[str] = (),
    exclude: Sequence[str] = (),
    whole: Sequence[str] = (),
    config: str | None = None,
    profile: Sequence[str] = (),
    model: str | None = None,
    name: str = "",
    probe: str | None = None,
    outputs: Sequence[str] = (),
    blocks: str = "auto",
    keep: int = 1,
    ceiling: float | None = None,
    max_jump: int = MAX_JUMP,
    max_work: float | None = None,
) -> Settings:
    """Check the options of `kilodelta.device.bundle`, and put them in the library's own terms.

    Args:
        mode, onnx, engine, flavour, provider, dtype, rank, slots, targets, exclude, whole, config,
        profile, model, name, probe, outputs, blocks, keep, ceiling, max_jump, max_work: as there.

    Raises:
        InputError: a value is out of its range, or options do not go together.

    Example:
        >>> settings_from(mode="adapter", profile=["batch=1,8,32"]).sizes
        {'batch': (1, 8, 32)}
    """
    precision = SHORT.get(dtype, dtype)
    settings = Settings(
        mode=_one_of(mode, "mode", MODES),
        dtype=_one_of(precision, "dtype", tuple(SHORT.values())),
        keep_onnx=onnx,
        capabilities=tuple(engine),
        flavour=_one_of(flavour, "flavour", (AUTO, *FLAVOURS)),
        provider=_one_of(provider, "provider", PROVIDERS),
        rank=_from(rank, "rank", 1),
        slots=_from(slots, "slots", 0),
        include=tuple(targets),
        exclude=tuple(exclude),
        whole=tuple(whole),
        config=config,
        sizes=read_sizes(profile),
        model=model,
        name=name,
        probe=probe,
        outputs=tuple(outputs),
        keep=_from(keep, "keep", 1, MAX_KEEP),
        ceiling=_ceiling(CEILINGS[precision] if ceiling is None else ceiling),
        max_jump=_from(max_jump, "max-jump", 1),
        max_work=_max_work(max_work),
        blocks=blocks,
    )
    settled(blocks, for_engines=bool(engine))
    _check_together(settings)
    return settings


def _one_of(value: str, name: str, known: Sequence[str]) -> str:
    if value not in known:
        raise InputError(f"--{name} is {value!r}", fix=f"give one of {', '.join(known)}")
    return value


def _from(value: int, name: str, low: int, high: int = (1 << 63) - 1) -> int:
    if not low <= value <= high:
        raise InputError(f"--{name} is {value}", fix=f"give a whole number from {low} to {high}")
    return value


def _ceiling(value: float) -> float:
    if not 0 < value <= 1:
        raise InputError(
            f"--ceiling is {value}: the outputs of an unrelated model are off by more than 1",
            fix="give a number above 0 and up to 1",
        )
    return value


def _max_work(value: float | None) -> float | None:
    if value is not None and not 0 < value < 1e300:
        raise InputError(f"--max-work is {value}", fix="give a number of operations, such as 1e12")
    return value


def _check_together(settings: Settings) -> None:
    mode = settings.mode
    if mode == "refit" and not settings.capabilities:
        raise InputError(
            "refit mode needs an engine", fix="give --engine with its GPU's name, such as sm89"
        )
    if mode == "patch" and settings.capabilities and settings.flavour not in (AUTO, RTX):
        raise InputError(
            f"patch mode changes engines of TensorRT-RTX, and this one is of {settings.flavour}",
            fix="take --mode refit for the engine, or --flavour tensorrt_rtx",
        )
    if mode != "adapter" and settings.slots:
        raise InputError(
            f"{mode} mode computes a batch with one fine-tune",
            fix="take --mode adapter for --slots, or leave --slots out",
        )
    if mode == "patch" and (settings.include or settings.exclude):
        raise InputError(
            "patch mode lets fine-tunes change every tensor",
            fix="leave --targets and --exclude out, or take --mode adapter or refit",
        )
    if mode == "refit" and settings.config:
        raise InputError(
            "refit mode keeps the base's own head, so --config has no use there",
            fix="take --mode adapter for fine-tunes that bring a head, or leave --config out",
        )
    if not settings.capabilities and (settings.flavour != AUTO or settings.keep_onnx):
        option = "--onnx" if settings.keep_onnx else "--flavour"
        raise InputError(
            f"{option} is of an engine, and none was asked for",
            fix=f"give --engine with GPUs such as sm86,sm89, or leave {option} out",
        )
    if mode != "adapter" and settings.whole:
        raise InputError(
            f"--whole is an option of adapter mode, and this is {mode} mode",
            fix="leave --whole out, or take --mode adapter",
        )
    if settings.model and settings.config:
        raise InputError("--model and --config both name an architecture", fix="give one of them")
    if settings.capabilities and settings.provider != PROVIDERS[0]:
        raise InputError(
            "an engine runs in TensorRT; --provider is ONNX Runtime's",
            fix="leave --provider out, or --engine",
        )
