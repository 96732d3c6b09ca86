"""Part two of a GPU's proof: what is exported for it computes what the merged model computes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from kilodelta.errors import KiloDeltaError, require
from kilodelta.export import cuda
from kilodelta.export.export import export
from kilodelta.export.options import Options as ExportOptions
from kilodelta.format.methods import Nola
from kilodelta.format.targets import Patterns
from kilodelta.models.quiet import quiet
from kilodelta.verify import gpu_base
from kilodelta.verify.gpu_part import Row, Setting
from kilodelta.verify.result import NOT_RUN, Result
from kilodelta.verify.verify import Options, verify

LAYERS = Patterns(include=("*layer.*.weight",), exclude=("*LayerNorm*",))
FLAVOURS = ("tensorrt", "rtx")


def parity(setting: Setting) -> Iterator[Row]:
    """A pico encoder, exported and run by torch, ONNX Runtime and both flavours of TensorRT."""
    base = _pico(setting.folder / "pico")
    delta = gpu_base.delta(base / "model.safetensors", Nola(rank=4, bases=64), LAYERS)
    file = setting.folder / "pico.kd"
    delta.save(file)
    inputs = _inputs(setting.folder / "inputs.npz")
    yield from _artefacts(setting, base, file, inputs, "onnx", ExportOptions())
    for flavour in FLAVOURS:
        yield from _engine(setting, base, file, inputs, flavour)


def _engine(setting: Setting, base: Path, file: Path, inputs: Path, flavour: str) -> Iterator[Row]:
    try:
        capability = cuda.driver().gpus()[0].sm
        options = ExportOptions(onnx=False, capabilities=(capability,), flavour=flavour)
        yield from _artefacts(setting, base, file, inputs, flavour, options)
    except (KiloDeltaError, cuda.CudaError) as error:
        yield Row(what=flavour, found=str(error).splitlines()[0], status=NOT_RUN)


def _artefacts(
    setting: Setting, base: Path, file: Path, inputs: Path, name: str, options: ExportOptions
) -> Iterator[Row]:
    out = setting.folder / f"out-{name}"
    export(base, file, out, options=options)
    chosen = Options(inputs=str(inputs), device="cuda" if setting.device != "cpu" else "cpu")
    report = verify(base, file, [out], options=chosen).report
    yield from (_row(result) for result in (report.results if report else ()))


def _row(result: Result) -> Row:
    if result.error is not None:
        found = result.error.what
    else:
        worst = max((check.error.relative_l2 for check in result.checks), default=0.0)
        found = f"relative L2 up to {worst:.2g} in {len(result.checks)} checks"
    what = f"{result.artefact} in {result.runner}, {result.precision}"
    return Row(what=what, found=found, status=result.status)


def _pico(folder: Path) -> Path:
    """A random BERT of a few kilobytes as a Hugging Face folder."""
    transformers = require("transformers", extra="hf", why="build a pico model")
    import torch

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=48,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        architectures=["BertModel"],
    )
    model = transformers.BertModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    with quiet():
        model.save_pretrained(folder)
    return folder


def _inputs(path: Path) -> Path:
    rng = np.random.default_rng(0)
    mask = (np.arange(12) < rng.integers(3, 13, (8, 1))).astype(np.int64)
    np.savez(path, input_ids=rng.integers(1, 48, (8, 12)) * mask, attention_mask=mask)
    return path
