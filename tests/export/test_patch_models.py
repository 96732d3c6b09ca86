"""Patch mode on real exports, ours and torch's own, and in a running ONNX Runtime."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
pytest.importorskip("transformers")

import torch

from kilodelta.errors import ExportError
from kilodelta.export.merge.checkpoint import merge
from kilodelta.export.onnx.make import export_template
from kilodelta.export.onnx.save import save
from kilodelta.export.onnx.template import Template, fill_template
from kilodelta.export.patching.make_map import make_map, write_rest
from kilodelta.export.patching.rewrite import patch
from kilodelta.export.patching.session import open_patched
from kilodelta.format.delta import Delta
from kilodelta.format.methods import Nola
from kilodelta.format.targets import Patterns
from kilodelta.models import example, open_model
from tests.support import making, onnx_files, pico

MATRICES = Patterns(
    include=("*layer.*.weight", "*.h.*.weight", "*.convolution.weight"),
    exclude=("*LayerNorm*", "*ln_*"),
    transposed=("*.h.*",),
)
METHOD = Nola(rank=4, bases=64)


@dataclass(frozen=True)
class Case:
    """A pico model, a delta for it, and the merged model, as folders."""

    base: Path
    merged: Path
    delta: Delta


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    made: dict[str, Case] = {}

    def case(name: str) -> Case:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            base = pico.MODELS[name](folder / "base")
            delta = making.delta(base, METHOD, patterns=MATRICES)
            merge(base, delta, folder / "merged")
            made[name] = Case(base, folder / "merged", delta)
        return made[name]

    return case


@pytest.fixture(scope="module")
def templates(cases: Callable[[str], Case]) -> Callable[..., Template]:
    return functools.cache(
        lambda name, dtype="float32": export_template(open_model(cases(name).base), dtype=dtype)
    )


@pytest.mark.parametrize(
    ("name", "dtype", "external"),
    [
        ("bert", "float32", False),
        ("bert", "float16", False),
        ("bert", "bfloat16", True),
        ("gpt2", "float32", True),
        ("resnet", "float32", False),
    ],
)
def test_the_patched_file_is_our_export_of_the_merged_model(
    cases: Callable[[str], Case],
    templates: Callable[..., Template],
    tmp_path: Path,
    name: str,
    dtype: str,
    external: bool,
) -> None:
    case, template = cases(name), templates(name, dtype)
    for folder in ("base", "wanted", "tuned"):
        (tmp_path / folder).mkdir()
    path = tmp_path / "base" / "m.onnx"
    save(fill_template(template, case.base), path, external=external)
    wanted = save(
        fill_template(template, case.merged), tmp_path / "wanted" / "m.onnx", external=external
    )
    places = make_map(path, case.base, unused=template.unused)
    rest = write_rest(places, case.base, tmp_path / "rest.safetensors")
    done = patch(path, case.delta, tmp_path / "tuned" / "m.onnx", places=places, base=rest)
    assert [file.name for file in done.files] == [file.name for file in wanted]
    for ours, theirs in zip(done.files, wanted, strict=True):
        assert ours.read_bytes() == theirs.read_bytes()


def by_torch(
    folder: Path, path: Path, *, dynamo: bool = True, output: str = "last_hidden_state"
) -> Path:
    """One of torch's own exporters, with its default optimisations."""
    loaded = open_model(folder).choosing([output])  # an encoder's pooler stays idle
    batch = example(loaded, rows=2, tokens=5)

    class Positional(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.view = loaded.view()

        def forward(self, *tensors: torch.Tensor) -> Any:
            return tuple(self.view(**dict(zip(batch, tensors, strict=True))).values())

    torch.onnx.export(
        Positional().eval(),
        tuple(batch.values()),
        str(path),
        input_names=list(batch),
        dynamo=dynamo,
        external_data=False,
        verbose=False,
    )
    return path


@pytest.mark.filterwarnings("ignore")  # torch's exporters talk a lot
@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
def test_torchs_own_exports_are_mapped_by_content(
    cases: Callable[[str], Case], tmp_path: Path, dynamo: bool
) -> None:
    case = cases("bert")
    model = by_torch(case.base, tmp_path / "m.onnx", dynamo=dynamo)
    places = make_map(model, case.base, unused=("pooler.dense.weight", "pooler.dense.bias"))
    targets = case.delta.targets
    turned = [name for name in targets if places.places[name][0].transposed]
    assert turned == list(targets)  # torch transposes and renames all of them
    assert not {p.name for name in targets for p in places.places[name]} & set(targets)
    patch(model, case.delta, tmp_path / "t.onnx", places=places)
    wanted = by_torch(case.merged, tmp_path / "w.onnx", dynamo=dynamo)
    assert onnx_files.held(tmp_path / "t.onnx") == onnx_files.held(wanted)
    assert (tmp_path / "t.onnx").read_bytes() == wanted.read_bytes()


@pytest.mark.filterwarnings("ignore")  # torch's exporters talk a lot
def test_convolutions_with_a_folded_norm_are_refused_by_name(
    cases: Callable[[str], Case], tmp_path: Path
) -> None:
    case = cases("resnet")
    model = by_torch(case.base, tmp_path / "m.onnx", output="logits")
    with pytest.raises(ExportError, match=r"resnet\.embedder\.embedder\.convolution\.weight: "):
        patch(model, case.delta, tmp_path / "t.onnx", places=make_map(model, case.base))


# in memory


def answers(session: Any) -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    feeds = {
        port.name: rng.integers(5, 40, (2, 6))
        if port.name == "input_ids"
        else np.ones((2, 6), np.int64)
        for port in session.get_inputs()
    }
    return list(session.run(None, feeds))


@pytest.mark.parametrize("external", [False, True, None], ids=["inside", "beside", "mixed"])
def test_a_session_serves_the_delta_without_a_new_file(
    cases: Callable[[str], Case],
    templates: Callable[..., Template],
    tmp_path: Path,
    external: bool | None,
) -> None:
    import onnx
    import onnxruntime

    case, template = cases("bert"), templates("bert")
    model = tmp_path / "m.onnx"
    save(fill_template(template, case.base), model, external=False)
    if external is not False:
        limit = 1000 if external else 1200  # bytes; matrices have 1024 and 1536
        onnx.save(
            onnx.load(str(model)),
            str(model),
            save_as_external_data=True,
            location="weights.bin",
            size_threshold=limit,
        )
    places = make_map(model, case.base, unused=template.unused)
    kinds = {place.file for name in case.delta.targets for place in places.places[name]}
    assert len(kinds) == (2 if external is None else 1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    session = open_patched(model, case.delta, places=places)
    gc.collect()  # what the session needs is held by it
    found = answers(session)
    (tuned,) = save(fill_template(template, case.merged), tmp_path / "w.onnx", external=False)
    # The same graph, optimised and run by the same library: equal to the last bit.
    for ours, theirs in zip(found, answers(onnxruntime.InferenceSession(str(tuned))), strict=True):
        assert np.array_equal(ours, theirs)
    for ours, old in zip(found, answers(onnxruntime.InferenceSession(str(model))), strict=True):
        assert np.abs(ours - old).max() > 1e-3
    tuned.unlink()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_session_in_half_precision(
    cases: Callable[[str], Case], templates: Callable[..., Template], tmp_path: Path
) -> None:
    import onnxruntime

    case, template = cases("bert"), templates("bert", "float16")
    model = tmp_path / "m.onnx"
    save(fill_template(template, case.base), model, external=True)
    places = make_map(model, case.base, unused=template.unused)
    session = open_patched(model, case.delta, places=places, base=case.base)
    (tuned,) = save(fill_template(template, case.merged), tmp_path / "w.onnx", external=False)
    for ours, theirs in zip(
        answers(session), answers(onnxruntime.InferenceSession(str(tuned))), strict=True
    ):
        assert np.array_equal(ours, theirs)
