"""Adapter graphs of pico models for tests: made once a session, run in the real ONNX Runtime."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kilodelta.export.adapter.graph import with_adapter
from kilodelta.export.adapter.layout import AdapterLayout
from kilodelta.export.merge.checkpoint import merge
from kilodelta.export.onnx.make import export_template
from kilodelta.export.onnx.save import save
from kilodelta.export.onnx.template import Template, fill_template
from kilodelta.format.delta import Delta
from kilodelta.format.methods import Method, Nola
from kilodelta.format.targets import Patterns
from kilodelta.models import LoadedModel, View, example, open_model
from kilodelta.verify.parity.gate import limit
from kilodelta.verify.parity.metrics import compare
from tests.support import pico
from tests.support.lasting import lasting_folder
from tests.support.making import delta

Feeds = dict[str, np.ndarray[Any, Any]]

CONV1D = ("*.c_attn.weight", "*.c_proj.weight", "*.c_fc.weight")
MATRICES = Patterns(include=("*.weight",), transposed=CONV1D)
RANK = 4
ROWS, TOKENS = 4, 6


@dataclass(frozen=True, kw_only=True)
class Base:
    """A pico model, its template and inputs for it."""

    path: Path
    loaded: LoadedModel
    template: Template
    feeds: Feeds


@functools.cache
def base(name: str) -> Base:
    """A pico model, exported once; of the bare encoder without its pooler, which then is idle."""
    folder = lasting_folder("adapting")
    path = pico.MODELS[name](folder / "base")
    loaded = open_model(path).choosing(["last_hidden_state"] if name == "bert" else [])
    template = export_template(loaded)
    rng = np.random.default_rng(0)
    batch = example(loaded, rows=ROWS, tokens=TOKENS)
    feeds = {port.name: batch[port.name].numpy() for port in template.inputs}
    if "input_ids" in feeds:
        feeds["input_ids"] = rng.integers(0, pico.VOCABULARY, (ROWS, TOKENS))
    else:
        feeds = {n: rng.normal(size=v.shape).astype(np.float32) for n, v in feeds.items()}
    return Base(path=path, loaded=loaded, template=template, feeds=feeds)


def graph(of: Base, folder: Path, **options: Any) -> tuple[Path, AdapterLayout]:
    """An adapter graph filled with the base's weights."""
    template, layout = with_adapter(of.template, of.path, name="pico", rank=RANK, **options)
    return save(fill_template(template, of.path), folder / "adapter.onnx")[0], layout


def fine_tune(of: Base, method: Method | None = None, **options: Any) -> Delta:
    """A random delta of a base, all matrices by default."""
    options.setdefault("patterns", MATRICES)
    return delta(of.path, method or Nola(rank=3, bases=40), **options)


def run(
    path: Path, feeds: Mapping[str, Any], *, optimised: bool = True, options: Any = None
) -> Any:
    """The first output in the real ONNX Runtime, one thread."""
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.log_severity_level, settings.intra_op_num_threads = 4, 1
    if not optimised:
        settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    return session.run(None, dict(feeds), options)[0]


def plain_file(of: Base, folder: Path) -> Path:
    """The base itself, exported to ONNX."""
    return save(fill_template(of.template, of.path), folder / "base.onnx")[0]


@torch.no_grad()
def within_gate(of: Base, tune: Delta, folder: Path, found: Any) -> bool:
    """Whether an output is as near to the merged model in float64 as the float32 gate asks."""
    place = folder / "gate.safetensors"
    merge(of.path, tune, place)
    batch = {name: torch.from_numpy(values) for name, values in of.feeds.items()}
    plain = _first(open_model(of.path, weights=place).view(), batch)
    exact = open_model(of.path, weights=place)
    exact.module.double()
    wide = {n: t.double() if t.is_floating_point() else t for n, t in batch.items()}
    truth = _first(exact.view(), wide)
    gate = limit([compare(plain, truth)], "float32")
    return gate.admits(compare(np.asarray(found), truth))


def _first(view: View, batch: Mapping[str, torch.Tensor]) -> Any:
    return next(iter(view(**batch).values())).numpy()
