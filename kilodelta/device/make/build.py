"""`kilodelta bundle`: check what is asked for, then make a device folder of a base.

What is deployed is exported once. Every fine-tune of this base can then be applied to it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from kilodelta.device.folder.bundle import MAX_JUMP, Bundle
from kilodelta.device.make.settings import settings_from
from kilodelta.device.update.trust import pins_from, provision
from kilodelta.errors import InputError, require
from kilodelta.export.quantised.checks import refuse_blocks
from kilodelta.export.tensorrt.flavour import AUTO
from kilodelta.files import staging
from kilodelta.grid.open import is_quantised
from kilodelta.models.hub import name_of
from kilodelta.progress import Progress, silent
from kilodelta.rehearsal import begin_work
from kilodelta.trust.tuf_repository import first_root

log = logging.getLogger(__name__)


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
    quantised = is_quantised(source)  # a base of a hub is looked at later
    if quantised:  # before an engine is asked for
        refuse_refit(mode, source)
    settings = settings_from(
        mode=mode,
        onnx=onnx,
        engine=engine,
        flavour=flavour,
        provider=provider,
        dtype=dtype,
        rank=rank,
        slots=slots,
        targets=targets,
        exclude=exclude,
        whole=whole,
        config=config,
        profile=profile,
        model=model,
        name=name or name_of(source) or Path(source).name,
        probe=probe,
        outputs=outputs,
        blocks=blocks,
        keep=keep,
        ceiling=ceiling,
        max_jump=max_jump,
        max_work=max_work,
    )
    if not quantised and Path(source).exists():
        refuse_blocks(blocks, source)
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
