"""Device folders made of a pico model and run by the real ONNX Runtime, in every mode it has."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from kilodelta.cli import main
from kilodelta.device import Device, apply, bundle, release, rollback, status
from kilodelta.device.golden import golden
from kilodelta.errors import InputError, KiloDeltaError, OutputError, ProofError
from kilodelta.export.tensorrt import cuda
from kilodelta.format.file import load
from kilodelta.format.methods import Method, Nola, RandLora
from kilodelta.format.targets import Patterns
from kilodelta.merging import build
from tests.support import pico

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

PATTERNS = Patterns(include=("encoder.*.weight",), exclude=("*LayerNorm*",))
BATCH = {
    "input_ids": np.array([[2, 5, 6, 7, 3], [2, 9, 3, 0, 0]]),
    "attention_mask": np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
}
MODES = ("adapter", "patch")


NOLA, RANDLORA = Nola(rank=4, bases=64), RandLora(rank=4)


def delta(base: Path, out: Path, seed: int, method: Method = NOLA, size: float = 0.02) -> Path:
    rng = np.random.default_rng(seed)
    numbers = {
        target.name: build.quantise_target(
            method,
            {g.name: rng.normal(size=g.shape) * size for g in method.groups(target)},
            8,
        )
        for target in build.targets(base, PATTERNS)
    }
    recipe = build.Recipe(method=method, patterns=PATTERNS, seed=seed, name="pico")
    build.build(base, recipe, numbers).save(out)
    return out


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two fine-tunes with and without version and probe, and a folder of each mode."""
    root = tmp_path_factory.mktemp("fleet")
    base = pico.sentence_bert(root / "base")
    (root / "texts.txt").write_text("\n".join(pico.TEXTS))
    for number, name in enumerate("ab", 1):
        delta(base, root / f"{name}.kd", number)
        release(
            base,
            root / f"{name}.kd",
            root / f"{name}{number}.kd",
            version=number,
            inputs=str(root / "texts.txt"),
        )
    for mode in MODES:
        bundle(base, root / mode, mode=mode, rank=4, probe=str(root / "texts.txt"))
    return root


@pytest.fixture
def device(root: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A copy of a fresh folder."""
    shutil.copytree(root / request.param, tmp_path / "device")
    return tmp_path / "device"


def merged(root: Path, name: str, tmp_path: Path) -> Any:
    """What torch gives with the merged model."""
    import torch

    import kilodelta
    from kilodelta.models import open_model, outputs

    kilodelta.merge(root / "base", root / f"{name}.kd", tmp_path / f"merged-{name}")
    loaded = open_model(tmp_path / f"merged-{name}")
    with torch.inference_mode():
        found = outputs(loaded, {n: torch.from_numpy(a) for n, a in BATCH.items()})
    return found["sentence_embedding"].numpy()


@pytest.mark.parametrize("device", MODES, indirect=True)
def test_a_life_on_a_device(root: Path, device: Path, tmp_path: Path) -> None:
    a, b = merged(root, "a", tmp_path), merged(root, "b", tmp_path)
    served = Device(device)
    base = served.run(BATCH)["sentence_embedding"]
    done = apply(device, root / "a1.kd")
    assert done.seen.errors["sentence_embedding"].relative_l2 < 1e-6
    np.testing.assert_allclose(served.run(BATCH)["sentence_embedding"], a, atol=2e-6)
    apply(device, root / "b2.kd")
    np.testing.assert_allclose(served.run(BATCH)["sentence_embedding"], b, atol=2e-6)
    other = served.run(BATCH, delta=root / "a.kd")["sentence_embedding"]
    np.testing.assert_allclose(other, a, atol=2e-6)
    assert np.abs(a - b).max() > 1e-3 < np.abs(a - base).max()
    assert np.array_equal(served.run(BATCH, "base")["sentence_embedding"], base)
    rollback(device)
    np.testing.assert_allclose(served.run(BATCH)["sentence_embedding"], a, atol=2e-6)
    assert status(device, check=True).state.highest == 2


@pytest.mark.parametrize("device", MODES, indirect=True)
def test_a_probe_of_another_fine_tune_is_refused(root: Path, device: Path, tmp_path: Path) -> None:
    mixed = replace(load(root / "a1.kd"), probes=load(root / "b2.kd").probes)
    mixed.save(tmp_path / "mixed.kd")
    with pytest.raises(ProofError, match="output sentence_embedding is off"):
        apply(device, tmp_path / "mixed.kd")
    assert status(device).state.serving.delta == ""


@pytest.mark.parametrize("device", ["adapter"], indirect=True)
def test_adapter_mode_refuses_full_rank(root: Path, device: Path, tmp_path: Path) -> None:
    file = delta(root / "base", tmp_path / "full.kd", 1, RANDLORA)
    with pytest.raises(InputError, match="full rank"):
        apply(device, file)


@pytest.mark.parametrize("device", ["patch"], indirect=True)
def test_patch_mode_takes_full_rank(root: Path, device: Path, tmp_path: Path) -> None:
    apply(device, delta(root / "base", tmp_path / "full.kd", 1, RANDLORA))
    assert status(device).state.serving.folder


def test_a_release_states_what_tells_in_which_precision(root: Path, tmp_path: Path) -> None:
    found = load(root / "a1.kd", root / "base")
    assert found.manifest.made["version"] == 1
    own = golden.of_delta(found)
    assert own is not None
    assert own.inputs["input_ids"].shape[0] == 2
    assert golden.limits_of(found, "float16")["sentence_embedding"].relative_l2 > 1e-4
    assert found.manifest.result == load(root / "a.kd").manifest.result
    with pytest.raises(OutputError, match="exists already"):
        release(root / "base", root / "a.kd", root / "a1.kd", version=3)
    plain = release(root / "base", root / "a.kd", tmp_path / "plain.kd", version=3)
    assert (plain.version, plain.dtypes) == (3, ())


def test_inputs_that_do_not_tell_are_refused(root: Path, tmp_path: Path) -> None:
    """A change so small that float32 rounds it away."""
    file = delta(root / "base", tmp_path / "tiny.kd", 1, size=1e-9)
    with pytest.raises(InputError, match="give the same outputs"):
        release(root / "base", file, tmp_path / "out.kd", version=1, inputs=str(root / "texts.txt"))
    assert not (tmp_path / "out.kd").exists()


def test_a_device_holds_what_its_requests_need(root: Path) -> None:
    """Unlike ONNX Runtime's RunOptions: nothing that a caller lets go ends a fine-tune, and
    fine-tunes neither add up nor stay behind."""
    device = Device(root / "adapter")

    def session_of(name: str) -> Any:
        return Device(root / "adapter").session(root / name)  # its Device is gone from here on

    first, second = session_of("a.kd"), session_of("b.kd")
    gc.collect()
    wanted = {n: device.run(BATCH, n)["sentence_embedding"] for n in ("base",)}
    wanted |= {n: device.run(BATCH, root / n)["sentence_embedding"] for n in ("a.kd", "b.kd")}
    for _ in range(5):
        assert np.array_equal(first.run(BATCH)["sentence_embedding"], wanted["a.kd"])
        assert np.array_equal(second.run(BATCH)["sentence_embedding"], wanted["b.kd"])
        assert np.array_equal(device.run(BATCH, "base")["sentence_embedding"], wanted["base"])
    assert not np.array_equal(wanted["a.kd"], wanted["b.kd"])
    assert not np.array_equal(wanted["a.kd"], wanted["base"])


@pytest.fixture(scope="module")
def slotted(root: Path) -> Path:
    """A folder whose batches may mix two fine-tunes; it serves the first one."""
    texts = str(root / "texts.txt")
    bundle(root / "base", root / "slotted", mode="adapter", rank=4, slots=2, probe=texts)
    apply(root / "slotted", root / "a1.kd")
    return root / "slotted"


def test_each_row_of_a_batch_has_its_own_fine_tune(root: Path, slotted: Path) -> None:
    one, many = Device(root / "adapter"), Device(slotted)
    names: dict[Any, Any] = {None: root / "a1.kd", "base": "base", root / "b.kd": root / "b.kd"}
    alone = {n: one.run(BATCH, file)["sentence_embedding"] for n, file in names.items()}
    for first in names:
        whole = many.run(BATCH, first)["sentence_embedding"]
        np.testing.assert_allclose(whole, alone[first], atol=2e-6)
        for second in names:
            found = many.run(BATCH, deltas=[first, second])["sentence_embedding"]
            np.testing.assert_allclose(found[0], alone[first][0], atol=2e-6)
            np.testing.assert_allclose(found[1], alone[second][1], atol=2e-6)
    assert np.abs(alone["base"] - alone[root / "b.kd"]).max() > 1e-3


def test_slots_are_reused_and_a_table_under_way_stays(
    root: Path, slotted: Path, tmp_path: Path
) -> None:
    device, copies = Device(slotted), []
    for name in "xyz":
        copies.append(tmp_path / f"{name}.kd")
        copies[-1].write_bytes((root / "b.kd").read_bytes())
    under_way = device._mode.mixed([device.session(one) for one in copies[:2]])
    table = device._mode._table  # type: ignore[attr-defined]
    device.run(BATCH, deltas=[copies[1], "base"])
    assert device._mode._table is table  # type: ignore[attr-defined]
    device.run(BATCH, deltas=["base", copies[2]])
    kept = device._mode._table[0]  # type: ignore[attr-defined]
    assert list(kept) == [device.session(copies[2]), device.session(copies[0])]
    found = under_way.run(BATCH)["sentence_embedding"]
    expected = device.run(BATCH, root / "b.kd")["sentence_embedding"]
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_rows_that_no_slot_has_room_for_are_refused(
    root: Path, slotted: Path, tmp_path: Path
) -> None:
    device = Device(slotted)
    three = {name: np.concatenate([array, array[:1]]) for name, array in BATCH.items()}
    (tmp_path / "c.kd").write_bytes((root / "b.kd").read_bytes())
    with pytest.raises(InputError, match="3 fine-tunes do not fit into 2 slots"):
        device.run(three, deltas=[root / "a.kd", root / "b.kd", tmp_path / "c.kd"])
    with pytest.raises(InputError, match="1 fine-tunes for 2 rows of input_ids"):
        device.run(BATCH, deltas=["base"])
    with pytest.raises(InputError, match="give one of both"):
        device.run(BATCH, "base", deltas=["base", None])
    for mode in MODES:
        with pytest.raises(InputError, match="computes a batch with one fine-tune"):
            Device(root / mode).run(BATCH, deltas=["base", root / "a.kd"])


def test_run_takes_a_delta_for_each_row(root: Path, slotted: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", **BATCH)  # type: ignore[arg-type]
    arguments = ["run", slotted, "--inputs", tmp_path / "x.npz", "-o", tmp_path / "y.npz"]
    chosen = ["--delta", "base", "--delta", root / "b.kd"]
    done = CliRunner().invoke(main, list(map(str, [*arguments, *chosen])))
    assert done.exit_code == 0, done.output
    expected = Device(slotted).run(BATCH, deltas=["base", root / "b.kd"])["sentence_embedding"]
    found = np.load(tmp_path / "y.npz")["sentence_embedding"]
    np.testing.assert_allclose(found, expected, atol=2e-6)


@pytest.mark.parametrize(
    "options",
    [{"mode": "refit"}, {"mode": "patch", "keep": 0}, {"mode": "patch", "slots": 1}],
)
def test_options_that_do_not_go_together(root: Path, tmp_path: Path, options: Any) -> None:
    with pytest.raises(InputError):
        bundle(root / "base", tmp_path / "device", **options)
    assert not (tmp_path / "device").exists()


WITHOUT = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {'torch', 'transformers', 'onnx', 'onnxscript', 'onnx_ir'}:
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)
sys.meta_path.insert(0, Refuse())
from kilodelta.cli import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize("device", MODES, indirect=True)
def test_a_device_needs_neither_torch_nor_onnx(root: Path, device: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", **BATCH)  # type: ignore[arg-type]
    steps = (
        ("apply", device, root / "a1.kd"),
        ("run", device, "--inputs", tmp_path / "x.npz", "--delta", root / "b2.kd"),
        ("rollback", device),
        ("status", device, "--check"),
    )
    for step in steps:
        done = subprocess.run(
            [sys.executable, "-c", WITHOUT, *map(str, step)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("device", ["adapter"], indirect=True)
def test_the_command_line(root: Path, device: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", **BATCH)  # type: ignore[arg-type]
    expected = {
        ("apply", device, root / "b2.kd"): (0, "sentence_embedding within"),
        ("apply", device, root / "a1.kd"): (15, ""),
        ("apply", device, root / "a1.kd", "--allow-downgrade", "--json"): (0, '"version": 1'),
        ("run", device, "--inputs", tmp_path / "x.npz"): (0, "[2, 16]"),
        ("run", device, "--inputs", tmp_path / "none.npz"): (9, ""),
        ("run", device, "--inputs", root / "a.kd"): (9, ""),
        ("run", device, "--inputs", tmp_path / "x.npz", "-o", tmp_path / "y.npz"): (0, ""),
        ("status", device, "--json"): (0, '"mode": "adapter"'),
        ("status", device): (0, "failed: the file has version 1"),
        ("rollback", device): (0, "version 2"),
        ("rollback", device, "--json"): (13, "nothing to go back to"),
        ("status", tmp_path): (13, ""),
    }
    for step, (code, said) in expected.items():
        done = CliRunner().invoke(main, list(map(str, step)))
        assert (done.exit_code, said in done.output) == (code, True), (step, done.output)
    found = np.load(tmp_path / "y.npz")["sentence_embedding"]
    assert found.shape == (2, 16)


def test_an_engine_folder_is_built_here_and_refuses_where_no_gpu_is(
    root: Path, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx")
    made = bundle(root / "base", tmp_path / "device", mode="adapter", rank=4, engine=["sm89"])
    assert made.runtime == "tensorrt_rtx"
    names = {file.file for file in made.files}
    assert {"model.engine", "adapter.json"} <= names
    assert "model.onnx" not in names
    if cuda.present() is None:
        with pytest.raises(KiloDeltaError):
            apply(tmp_path / "device", root / "a1.kd")
        assert status(tmp_path / "device").state.serving.delta == ""


def test_ids_that_are_no_whole_numbers_are_refused(root: Path, tmp_path: Path) -> None:
    """numpy would cut them in silence, and every output would be another text's."""
    batch = {**BATCH, "input_ids": BATCH["input_ids"] + 0.5}
    device = Device(root / "adapter")
    with pytest.raises(InputError, match=r"input_ids holds 2\.5 as float64; the model takes int64"):
        device.run(batch)
    exact = {**BATCH, "input_ids": BATCH["input_ids"].astype(np.float32)}
    assert np.array_equal(
        device.run(exact)["sentence_embedding"], device.run(BATCH)["sentence_embedding"]
    )
    np.savez(tmp_path / "x.npz", **batch)  # type: ignore[arg-type]
    arguments = ["run", str(root / "adapter"), "--inputs", str(tmp_path / "x.npz")]
    result = CliRunner().invoke(main, arguments)
    assert (result.exit_code, "input_ids holds 2.5" in result.stderr) == (9, True)


@pytest.mark.parametrize("device", ["adapter"], indirect=True)
def test_a_rank_above_the_bundles_is_refused_with_the_option(
    root: Path, device: Path, tmp_path: Path
) -> None:
    file = delta(root / "base", tmp_path / "wide.kd", 1, Nola(rank=6, bases=64))
    with pytest.raises(InputError, match="the file has rank 6, the graph takes up to 4") as caught:
        apply(device, file)
    assert "kilodelta bundle --rank 6" in caught.value.fix


@pytest.mark.parametrize("version", [-1, 1 << 63, 1 << 64])
def test_a_version_that_no_device_takes_is_not_written(
    root: Path, tmp_path: Path, version: int
) -> None:
    with pytest.raises(InputError, match="is out of range"):
        release(root / "base", root / "a.kd", tmp_path / "out.kd", version=version)
    assert not (tmp_path / "out.kd").exists()


def test_the_highest_version_is_written_and_taken(root: Path, tmp_path: Path) -> None:
    release(root / "base", root / "a.kd", tmp_path / "out.kd", version=(1 << 63) - 1)
    shutil.copytree(root / "adapter", tmp_path / "device")
    done = apply(tmp_path / "device", tmp_path / "out.kd", allow_jump=True)
    assert done.state.highest == (1 << 63) - 1
    assert not done.result_proved


def test_a_release_goes_over_no_link(root: Path, tmp_path: Path) -> None:
    (tmp_path / "out.kd").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match="exists already"):
        release(root / "base", root / "a.kd", tmp_path / "out.kd", version=1)
    with pytest.raises(InputError, match="probes nothing"):
        release(root / "base", root / "a.kd", tmp_path / "new.kd", version=1, rows=0)
    with pytest.raises(InputError, match="counts rows of a probe"):
        release(root / "base", root / "a.kd", tmp_path / "new.kd", version=1, rows=4)


PIXELS = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 4, 3)

    def forward(self, pixels):
        return {"logits": self.conv(pixels).mean((2, 3))}
"""


def test_a_profile_lets_images_of_an_onnx_folder_vary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heights and widths are fixed unless they are named, with an engine or without."""
    import onnx
    import torch
    from safetensors.torch import save_file

    (tmp_path / "pixel_net.py").write_text(PIXELS)
    monkeypatch.syspath_prepend(str(tmp_path))
    torch.manual_seed(0)
    from pixel_net import Net  # type: ignore[import-not-found]

    save_file(Net().state_dict(), tmp_path / "base.safetensors")
    np.savez(tmp_path / "probe.npz", pixels=torch.randn(4, 1, 8, 8).numpy())
    profiles = {"fixed": (), "free": ("height=6,8,12", "width=6,8,12")}
    for name, profile in profiles.items():
        bundle(
            tmp_path / "base.safetensors",
            tmp_path / name,
            mode="patch",
            model="pixel_net:Net",
            probe=str(tmp_path / "probe.npz"),
            profile=profile,
        )
        [pixels] = onnx.load(tmp_path / name / "base" / "model.onnx").graph.input
        shape = [size.dim_param or size.dim_value for size in pixels.type.tensor_type.shape.dim]
        assert shape == ["batch", 1, *(("height", "width") if profile else (8, 8))]


REFUSED = [
    (["--mode", "refit"], "refit mode needs an engine"),
    (
        ["--mode", "patch", "--engine", "sm89", "--flavour", "tensorrt"],
        "patch mode changes engines of TensorRT-RTX, and this one is of tensorrt",
    ),
    (["--mode", "patch", "--slots", "2"], "computes a batch with one fine-tune"),
    (["--mode", "patch", "--targets", "*"], "lets fine-tunes change every tensor"),
    (["--mode", "adapter", "--engine", "sm89", "--provider", "cuda"], "an engine runs in TensorRT"),
    (
        ["--mode", "adapter", "--engine", "sm89", "--profile", "batch=3,2,1"],
        "no profile of an axis",
    ),
]


def test_options_are_refused_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    """In a process where torch cannot be imported."""
    code = f"{WITHOUT.rpartition('main(sys.argv')[0]}\n" + (
        "import json\nfrom click.testing import CliRunner\n"
        "for options in json.loads(sys.argv[1]):\n"
        "    result = CliRunner().invoke(main, ['bundle', 'base', '-o', 'device', *options])\n"
        "    print(result.exit_code, result.stderr.splitlines()[0])\n"
    )
    options = json.dumps([options for options, _ in REFUSED])
    done = subprocess.run(
        [sys.executable, "-c", code, options],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    for line, (_, said) in zip(done.stdout.splitlines(), REFUSED, strict=True):
        assert line.startswith("9 error: ")
        assert said in line


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mode": "magic"}, "--mode is 'magic'"),
        ({"mode": "adapter", "dtype": "fp8"}, "--dtype is 'fp8'"),
        ({"mode": "adapter", "provider": "npu"}, "--provider is 'npu'"),
        ({"mode": "adapter", "rank": 0}, "--rank is 0"),
        ({"mode": "adapter", "slots": -1}, "--slots is -1"),
        ({"mode": "adapter", "keep": 0}, "--keep is 0"),
        ({"mode": "adapter", "keep": 1001}, "--keep is 1001"),
        ({"mode": "adapter", "max_jump": 0}, "--max-jump is 0"),
        ({"mode": "adapter", "ceiling": 0.0}, "--ceiling is 0.0"),
        ({"mode": "adapter", "ceiling": float("inf")}, "--ceiling is inf"),
        ({"mode": "adapter", "ceiling": float("nan")}, "--ceiling is nan"),
    ],
)
def test_settings_out_of_range(tmp_path: Path, options: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        bundle("base", tmp_path / "device", **options)
