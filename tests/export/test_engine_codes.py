"""Patch mode for engines of quantised bases: codes are found, written, and proved by a build."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from kilodelta.errors import (
    BaseMismatchError,
    CheckpointError,
    ExportError,
    ProofError,
    QualityError,
)
from kilodelta.export.merge.checkpoint import merge
from kilodelta.export.patching.codes.places import CodePlaces
from kilodelta.export.patching.codes.streams import parts_in_rest, streams
from kilodelta.export.patching.engine.apart import require_built
from kilodelta.export.patching.engine.builds import EngineBuilds
from kilodelta.export.patching.engine.codes import (
    code_places,
    find_codes,
    moved_codes,
    random_codes,
)
from kilodelta.export.patching.engine.map import make_engine_map
from kilodelta.export.patching.make_map import write_rest
from kilodelta.export.patching.map import PatchMap
from kilodelta.export.patching.map_file import read_map, write_map
from kilodelta.export.patching.rewrite import patch
from kilodelta.format.delta import Delta
from kilodelta.format.file import load
from kilodelta.format.methods import Lora
from kilodelta.format.targets import Patterns
from kilodelta.grid import Matrix, QuantisedModel, open_quantised
from kilodelta.grid.codes import E2M1, E4M3
from kilodelta.grid.layouts import DequantizeLinear
from kilodelta.merging.build import Recipe, build, quantise_target
from tests.doubles.quantised_engine import Compiler, engine, stream, write_base
from tests.support.processes import BLOCKED, run

PLACED = ("plain.weight", "turned.weight", "twice.weight")


@dataclasses.dataclass
class Case:
    """A quantised base, its engine with the map, and a fine-tune of what has a place."""

    folder: Path
    base: QuantisedModel
    places: PatchMap
    rest: Path | None

    @property
    def model(self) -> Path:
        return self.folder / "model.engine"

    def patch(self, delta: Delta | Path, **options: Any) -> bytes:
        out = self.folder / "tuned.engine"
        places = options.pop("places", self.places)
        patch(self.model, delta, out, places=places, base=self.rest, **options)
        data = out.read_bytes()
        out.unlink()
        return data

    def is_clean(self) -> bool:
        return not (self.folder / "tuned.engine").exists()


def mapped(
    folder: Path,
    precision: str,
    spoil: Any = lambda data, own: data,
    copies: Mapping[str, str] = MappingProxyType({}),
) -> Case:
    folder.mkdir(exist_ok=True)
    base = write_base(folder, precision, copies)
    places = make_engine_map(
        folder / "model.engine",
        base,
        Compiler(base, spoil),
        dtype="F32",
        weights=[*base.stored, "bias"],
    )
    rest = write_rest(places, base, folder / "rest.safetensors")
    return Case(folder=folder, base=base, places=places, rest=rest)


def tune(case: Case, names: tuple[str, ...] = PLACED, size: float = 0.3) -> Delta:
    random, lora = np.random.default_rng(4), Lora(rank=2)
    own = {}
    for name in names:
        rows, columns = case.base.of(name).shape
        factors = {"A": random.normal(size=(2, columns)), "B": size * random.normal(size=(rows, 2))}
        own[name] = quantise_target(lora, factors, 8)
    recipe = Recipe(method=lora, patterns=Patterns(include=names, exclude=()), bits=8)
    return build(case.base.path, recipe, own)


def is_transposed(place: CodePlaces) -> bool:
    assert isinstance(place.layout, DequantizeLinear)
    return place.layout.transposed


def built(case: Case, delta: Delta) -> tuple[bytes, str]:
    """The fine-tune's engine as it is built, and its digest."""
    merge(case.base.path, delta, case.folder / "merged")
    merged = open_quantised(case.folder / "merged")
    data = engine({name: merged.matrix(name) for name in merged.stored})
    return data, f"sha256:{hashlib.sha256(data).hexdigest()}"


@pytest.fixture(params=["int4-g32", "fp8", "nvfp4"])
def case(tmp_path: Path, request: pytest.FixtureRequest) -> Case:
    return mapped(tmp_path, request.param)


def test_a_patched_engine_is_a_built_one(case: Case) -> None:
    delta = tune(case)
    wanted, stated = built(case, delta)
    before = case.model.read_bytes()
    assert case.patch(delta) == wanted != before
    for threads in (1, 2):
        assert case.patch(delta, promised=stated, threads=threads) == wanted
    assert case.model.read_bytes() == before


def test_layouts_are_told_apart_and_scales_are_read_where_they_are(case: Case) -> None:
    turned = {n: [is_transposed(one) for one in own] for n, own in case.places.codes.items()}
    assert {n: turned[n] for n in PLACED} == {
        "plain.weight": [False],
        "turned.weight": [True],
        "twice.weight": [False, True],
    }
    copies = [one.parts for name in PLACED for one in case.places.codes[name]]
    scales = [parts["x_scale"].file for parts in copies]
    kind = case.base.matrix("plain.weight").kind.name
    engine = "model.engine"  # which is not searched for the four bytes of FP8's one scale
    # The second copy of NVFP4's codes shares the scales of the first, in another order.
    expected = {"int4": [engine] * 4, "e4m3": [""] * 4, "e2m1": [engine] * 3 + [""]}
    assert scales == expected[kind]
    factors = [parts["x_scale_scale"].file for parts in copies if "x_scale_scale" in parts]
    assert factors == [""] * (4 if kind == "e2m1" else 0)
    [bias] = case.places.places["bias"]
    assert bias.dtype == "F32"


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("unpacked.weight", "its codes are nowhere: TensorRT unpacked or reordered them"),
        ("swizzled.weight", "its codes are nowhere"),
    ],
)
def test_what_has_no_place_is_refused_by_name(case: Case, name: str, why: str) -> None:
    with pytest.raises(ExportError, match=rf"has no place in the engine\n  {name}: {why}") as error:
        case.patch(tune(case, (*PLACED, name)))
    assert "--mode adapter" in error.value.fix
    assert "refit" not in error.value.fix
    assert case.is_clean()


def test_scales_of_nvfp4_go_with_their_own_factor() -> None:
    """Where float16 takes another factor than float32, its E4M3 numbers are not the rest's."""
    random = np.random.default_rng(8)
    eighths = random.integers(8, 16, size=(6, 4))  # 8 / 8 to 15 / 8: exact in E4M3
    codes = random.integers(0, 8, size=(6, 64)).astype(np.uint8)
    for exponent, is_shared in ((-3, True), (-30, False)):  # 2^-24 is float16's smallest
        matrix = Matrix(kind=E2M1, codes=codes, steps=np.ldexp(eighths, exponent), block=(1, 16))
        half = streams(matrix, "float16", transposed=True)[1]
        held = b"|".join(half[role].data.tobytes() for role in ("x", "x_scale"))
        [place] = find_codes(held, "w", matrix, "m.engine")
        copy = code_places(held, matrix, place, "float16")
        assert copy.parts["x_scale"].file == ("m.engine" if is_shared else "")
        rest = {
            role: parts_in_rest(copy, matrix)[part.name]
            for role, part in copy.parts.items()
            if part.file == ""
        }
        found = copy.layout.unpack({**half, **rest})
        assert np.array_equal(found.steps, matrix.steps)
        assert np.array_equal(found.codes, codes)


def test_a_twin_of_a_float_kind_has_no_minus_zero() -> None:
    """A merge writes none, so a build may not show where one would lie."""
    for kind, minus_zero in ((E2M1, 8), (E4M3, 128)):
        codes = np.full((32, 64), minus_zero, np.uint8)
        codes[0] = np.arange(64) % (1 << kind.bits)
        base = Matrix(kind=kind, codes=codes, steps=np.ones((32, 4)), block=(1, 16))
        assert not (random_codes(base, 1).codes == minus_zero).any()
        moved = moved_codes(base, 1).codes
        assert (moved[codes != minus_zero] != minus_zero).all()
        assert (moved != codes).mean() > 0.5


def test_too_few_codes_are_not_looked_for(tmp_path: Path) -> None:
    case = mapped(tmp_path, "fp8")
    assert case.places.refused["few.weight"] == "it has too few codes to be told from others"


def test_a_weight_that_is_also_in_another_form_refutes_the_map(tmp_path: Path) -> None:
    def spoil(data: bytes, own: Any) -> bytes:
        return data + bytes(own["plain.weight"].values().sum(axis=0).tobytes())

    with pytest.raises(ExportError, match=r"a further fine-tune none is the patched") as error:
        mapped(tmp_path, "int4-g32", spoil)
    assert "--mode adapter" in error.value.fix


def test_weights_of_equal_codes_have_a_place_each(tmp_path: Path) -> None:
    case = mapped(tmp_path, "int4-g32", copies={"turned.copy.weight": "turned.weight"})
    base = case.base
    own = {name: base.matrix(name) for name in base.stored}
    assert np.array_equal(own["turned.weight"].codes, own["turned.copy.weight"].codes)
    [one], [other] = (case.places.codes[n] for n in ("turned.weight", "turned.copy.weight"))
    held = case.model.read_bytes()
    codes = [held[p.codes.begin : p.codes.begin + p.codes.nbytes] for p in (one, other)]
    assert one.codes.begin != other.codes.begin
    assert codes == [stream(own["turned.weight"].codes.T, 4)] * 2
    delta = tune(case)  # of all but the copy
    wanted, stated = built(case, delta)
    assert case.patch(delta, promised=stated) == wanted


def test_a_fine_tune_that_leaves_equal_codes_alone_is_proved_with_them_apart(
    tmp_path: Path,
) -> None:
    case = mapped(tmp_path, "int4-g32", copies={"turned.copy.weight": "turned.weight"})
    delta = tune(case, ("plain.weight",))
    merge(case.base.path, delta, tmp_path / "merged")
    merged = open_quantised(tmp_path / "merged")
    builds = EngineBuilds(Compiler(merged, lambda data, own: data), tmp_path)
    patched = case.patch(delta)
    with pytest.raises(ExportError, match="a build has"):  # it holds the two once
        builds.require_build({}, patched, "it")
    require_built(builds, patched, case.places, merged, "F32")
    for name in ("plain.weight", "turned.weight", "turned.copy.weight"):
        wrong = bytearray(patched)
        wrong[case.places.codes[name][0].codes.begin] ^= 1
        with pytest.raises(ExportError, match="the map is refuted"):
            require_built(builds, bytes(wrong), case.places, merged, "F32")


def test_equal_codes_without_a_place_are_refused_both(tmp_path: Path) -> None:
    case = mapped(tmp_path, "int4-g32", copies={"swizzled.copy.weight": "swizzled.weight"})
    assert case.places.refused["swizzled.weight"] == (
        "its values equal those of swizzled.copy.weight, and TensorRT keeps equal ones once"
    )
    with pytest.raises(ExportError, match=r"swizzled\.copy\.weight: its values equal those of sw"):
        case.patch(tune(case, (*PLACED, "swizzled.copy.weight")))
    wanted, stated = built(case, tune(case))
    assert case.patch(tune(case), promised=stated) == wanted


def test_a_map_is_read_as_it_was_written(case: Case) -> None:
    write_map(case.places, case.folder / "map.json")
    assert read_map(case.folder / "map.json") == case.places


def test_a_device_patches_without_torch_and_onnx(tmp_path: Path) -> None:
    case = mapped(tmp_path, "int4-g32")
    write_map(case.places, tmp_path / "map.json")
    delta = tune(case)
    wanted, stated = built(case, delta)
    delta.save(tmp_path / "task.kd")
    run(
        f"{BLOCKED}\nfrom kilodelta.export.patching.map_file import read_map\n"
        "from kilodelta.export.patching.rewrite import patch\n"
        f"patch({str(case.model)!r}, {str(tmp_path / 'task.kd')!r}, {str(tmp_path / 'o')!r},"
        f" places=read_map({str(tmp_path / 'map.json')!r}), promised={stated!r})\n"
    )
    assert (tmp_path / "o").read_bytes() == wanted


def test_an_update_below_half_a_step_is_refused(tmp_path: Path) -> None:
    case = mapped(tmp_path, "int4-g32")
    delta = tune(case, size=1e-6)
    stated = f"sha256:{hashlib.sha256(case.model.read_bytes()).hexdigest()}"
    for promised in (None, stated):
        with pytest.raises(QualityError, match="changes 0 of") as error:
            case.patch(delta, promised=promised)
        assert "adapter mode" in error.value.fix
        assert case.is_clean()


def test_wrong_engines_maps_and_digests_are_refused(case: Case) -> None:
    delta = tune(case)
    _, stated = built(case, delta)
    with pytest.raises(ProofError, match=r"the patched engine is sha256:.*, a build of it is sha"):
        case.patch(delta, promised="sha256:" + "0" * 64)
    [one] = case.places.codes["plain.weight"]
    moved = dataclasses.replace(one.codes, begin=one.codes.begin + 1)
    other = dataclasses.replace(one, parts={**one.parts, "x": moved})
    broken = {**case.places.codes, "plain.weight": (other,)}
    with pytest.raises((ProofError, CheckpointError)):
        case.patch(delta, promised=stated, places=dataclasses.replace(case.places, codes=broken))
    # Codes and scales of the base are in the digest, as is every other byte.
    good = case.model.read_bytes()
    for at in (3, one.codes.begin, len(good) - 5):
        case.model.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        with pytest.raises((CheckpointError, ProofError)):
            case.patch(delta, promised=stated)
    assert case.is_clean()


def test_a_file_for_another_base_is_refused(tmp_path: Path) -> None:
    case = mapped(tmp_path / "int4", "int4-g32")
    other = mapped(tmp_path / "fp8", "fp8")
    tune(other).save(tmp_path / "fp8.kd")
    with pytest.raises(BaseMismatchError, match=r"its grids are int4 1x32"):
        case.patch(load(tmp_path / "fp8.kd"))
