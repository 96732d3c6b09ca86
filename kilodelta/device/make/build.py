"""`kilodelta bundle`: check what is asked for, then make a device folder of a base.

What is deployed is exported once. Every fine-tune of this base can then be applied to it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kilodelta.device.folder.bundle import CEILINGS, MAX_JUMP, MAX_KEEP, MODES, Bundle
from kilodelta.device.update.trust import pins_from, provision
from kilodelta.errors import InputError, require
from kilodelta.export.manifest.facts import Sizes
from kilodelta.export.options import SHORT, read_sizes
from kilodelta.export.quantised.checks import refuse_blocks
from kilodelta.export.quantised.graph import settled
from kilodelta.export.tensorrt.flavour import AUTO, RTX
from kilodelta.files import staging
from kilodelta.grid.open import is_quantised
from kilodelta.models.hub import name_of
from kilodelta.progress import Progress, silent
from kilodelta.rehearsal import begin_work
from kilodelta.trust.tuf_repository import first_root

log = logging.getLogger(__name__)

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


def bundle(
    base: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    mode: str,
    onnx: bool = False,
    engine: Sequence[str] = (),
    flavour: str = AUTO,
    provider: str = "cpu",
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
    trust: Sequence[str | os.PathLike[str]] = (),
    threshold: int = 1,
    task: str = "",
    kind: str = "",
    mirror: str | os.PathLike[str] | None = None,
    progress: Progress = silent,
) -> Bundle:
    """Make a device folder that serves the base.

    Args:
        base: a folder, a `.safetensors` file (with `model`) or `hf:org/name`.
        out: a new folder.
        mode: how fine-tunes are applied: "adapter", "patch" or "refit" (docs/deploy.md).
        onnx: keep the ONNX file that an engine was built from.
        engine: GPUs to build an engine for, such as `["sm89"]`; ONNX Runtime runs the model
            without any.
        flavour: which TensorRT: "tensorrt", "tensorrt_rtx", or "auto".
        provider: where ONNX Runtime runs: "cpu" or "cuda".
        dtype: precision of weights and arithmetic: "fp32", "fp16" or "bf16".
        rank: adapter mode: the highest rank that a fine-tune may have.
        slots: adapter mode: how many fine-tunes one batch may mix; 0 for one per batch.
        targets: adapter and refit mode: globs of the tensors that fine-tunes may change; all
            layers by default.
        exclude: globs of those that they may not.
        whole: adapter mode: globs of tensors of the base that fine-tunes may store whole, such as
            `["*.LayerNorm.*"]`; patch mode takes any.
        config: where the fine-tunes have a head that the base lacks: the folder of one of them, its
            `config.json`, or its `.kd` file. In adapter mode with ONNX Runtime, without slots, one
            device folder takes heads of any number of labels.
        profile: sizes of an axis, such as `["batch=1,8,32"]`, for which an engine is built. In an
            ONNX file images vary in `height` and `width` only where these are named.
        model: `package.module:function` that builds the module.
        name: the base's name, for messages; its folder's by default.
        probe: golden inputs: `.npz`, `.jsonl`, `.txt` or `package.module:function`. Without any
            they are made up, where the model's kind is known.
        outputs: names or globs of the outputs to serve; by default all that the model declares.
        blocks: of a quantised base, the operators that hold its codes: "matmulnbits", which ONNX
            Runtime computes without unpacking a matrix; "qdq", which TensorRT takes alone; "auto",
            the one that suits.
        keep: fine-tunes that stay on the device's disk to go back to.
        ceiling: the most that a `.kd` file's own probe may allow an output to be off, relative;
            by default 0.01 in fp32, 0.1 in fp16, 0.5 in bf16.
        max_jump: how far a version may exceed the highest one that the device has had.
        max_work: the most operations that a `.kd` file may ask for; by default what suits the
            base's size.
        trust: public keys (`NAME.pub`); the device then takes signed releases only.
        threshold: how many of them must have signed.
        task: the one task whose releases the device takes; any by default.
        kind: the device's kind; without one it takes releases for every kind only.
        mirror: the mirror's `metadata/1.root.json`, for `kilodelta pull`.
        progress: called after each step.

    Raises:
        InputError: options that do not go together; checked before anything heavy is imported.
        ExportError: the model cannot be exported, or an engine not be built.
        MissingPackageError: torch, onnxscript, transformers or TensorRT is needed.
        OutputError: `out` holds something, or cannot be written.

    Example:
        >>> bundle("base/", "device/", mode="adapter", probe="texts.jsonl")  # doctest: +SKIP
    """
    source = os.fspath(base)
    precision = SHORT.get(dtype, dtype)
    settings = Settings(
        mode=_one_of(mode, "mode", MODES),
        dtype=_one_of(precision, "dtype", tuple(SHORT.values())),
        keep_onnx=onnx,
        capabilities=tuple(engine),
        flavour=flavour,
        provider=_one_of(provider, "provider", PROVIDERS),
        rank=_from(rank, "rank", 1),
        slots=_from(slots, "slots", 0),
        include=tuple(targets),
        exclude=tuple(exclude),
        whole=tuple(whole),
        config=config,
        sizes=read_sizes(profile),
        model=model,
        name=name or name_of(source) or Path(source).name,
        probe=probe,
        outputs=tuple(outputs),
        keep=_from(keep, "keep", 1, MAX_KEEP),
        ceiling=_ceiling(CEILINGS[precision] if ceiling is None else ceiling),
        max_jump=_from(max_jump, "max-jump", 1),
        max_work=_max_work(max_work),
        blocks=blocks,
    )
    settled(blocks, for_engines=bool(engine))
    if is_quantised(source):  # before an engine is asked for; one of a hub is looked at later
        refuse_refit(settings.mode, source)
    elif Path(source).exists():
        refuse_blocks(blocks, source)
    _check_together(settings)
    pins = pins_from(trust, threshold=threshold, task=task, kind=kind)
    mirror_root = None if mirror is None else first_root(mirror)
    require("torch", extra="onnx", why="export models")
    require("onnxscript", extra="onnx", why="export ONNX models")
    from kilodelta.device.make.bundling import BundleJob

    staging.require_free(Path(out))
    begin_work(Path(out), base=source, mode=f"{settings.mode}, {settings.dtype}")
    log.info("bundle %s: %s mode, %s", source, settings.mode, settings.dtype)
    with staging.new_folder(Path(out)) as stage:
        with BundleJob(source, settings, progress, room=Path(out)) as job:
            made = job.run(stage)
        provision(stage, pins, mirror_root)
    return made


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


def refuse_refit(mode: str, base: object) -> None:
    """Refuse refit mode for a quantised base.

    Raises:
        InputError: the mode is refit.
    """
    if mode == "refit":
        raise InputError(
            f"{base} is a quantised model, and TensorRT refits no codes",
            fix="take --mode adapter, which leaves the codes alone",
        )


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
