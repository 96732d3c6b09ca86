"""A Triton model repository: its text parsed by protobuf under the official field names."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

pytest.importorskip("google.protobuf")

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

from kilodelta.errors import ExportError, FileError, InputError, OutputError, ProofError
from kilodelta.export.manifest import artefacts
from kilodelta.export.manifest.facts import (
    Artefact,
    DeltaFacts,
    EngineFacts,
    ExportManifest,
    FileFact,
    Port,
)
from kilodelta.export.triton.config import config
from kilodelta.export.triton.repository import require_servable, write_repository

# Name, number, type and label of the fields used, from model_config.proto of
# https://github.com/triton-inference-server/common (proto3; repeated is 3, optional 1).
_INT32, _INT64, _STRING, _ENUM, _MESSAGE = 5, 3, 9, 14, 11
_TYPES = (
    "INVALID", "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64",
    "FP16", "FP32", "FP64", "STRING", "BF16",
)  # fmt: skip
_FIELDS: dict[str, list[tuple[str, int, int, int, str]]] = {
    "ModelTensorReshape": [("shape", 1, _INT64, 3, "")],
    "ModelInput": [
        ("name", 1, _STRING, 1, ""),
        ("data_type", 2, _ENUM, 1, "DataType"),
        ("dims", 4, _INT64, 3, ""),
        ("reshape", 5, _MESSAGE, 1, "ModelTensorReshape"),
    ],
    "ModelOutput": [
        ("name", 1, _STRING, 1, ""),
        ("data_type", 2, _ENUM, 1, "DataType"),
        ("dims", 3, _INT64, 3, ""),
        ("reshape", 5, _MESSAGE, 1, "ModelTensorReshape"),
    ],
    "ModelDynamicBatching": [("preferred_batch_size", 1, _INT32, 3, "")],
    "ModelInstanceGroup": [("kind", 4, _ENUM, 1, "Kind")],
    "ModelConfig": [
        ("name", 1, _STRING, 1, ""),
        ("backend", 17, _STRING, 1, ""),
        ("max_batch_size", 4, _INT32, 1, ""),
        ("input", 5, _MESSAGE, 3, "ModelInput"),
        ("output", 6, _MESSAGE, 3, "ModelOutput"),
        ("dynamic_batching", 11, _MESSAGE, 1, "ModelDynamicBatching"),
        ("instance_group", 7, _MESSAGE, 3, "ModelInstanceGroup"),
    ],
}


def _model_config() -> Any:
    file = descriptor_pb2.FileDescriptorProto(
        name="model_config.proto", package="inference", syntax="proto3"
    )
    kinds = {"DataType": [f"TYPE_{name}" for name in _TYPES], "Kind": ["KIND_AUTO", "KIND_GPU"]}
    for name, values in kinds.items():
        enum = file.enum_type.add(name=name)
        for number, value in enumerate(values):
            enum.value.add(name=value, number=number)
    for name, fields in _FIELDS.items():
        message = file.message_type.add(name=name)
        for field, number, kind, label, of in fields:
            added = message.field.add(name=field, number=number, type=kind, label=label)
            if of:
                added.type_name = f".inference.{of}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("inference.ModelConfig"))


def parsed(text: str) -> Any:
    return text_format.Parse(text, _model_config()())


IDS = Port(name="input_ids", dtype="int64", shape=("batch", "sequence"))
LOGITS = Port(name="logits", dtype="float32", shape=("batch", 3))


def artefact(**changes: Any) -> Artefact:
    made = Artefact(
        kind="onnx",
        dtype="float32",
        files=(FileFact(file="model.fp32.onnx", sha256="sha256:" + "0" * 64, nbytes=0),),
        inputs=(IDS,),
        outputs=(LOGITS,),
        profile=MappingProxyType({"input_ids": ((1, 1), (8, 64), (32, 512))}),
    )
    return replace(made, **changes)


def engine(flavour: Any, **changes: Any) -> Artefact:
    facts = EngineFacts(
        flavour=flavour,
        version="10.13",
        capabilities=("sm89",),
        tf32=False,
        refittable=(),
        onnx="sha256:" + "0" * 64,
    )
    return artefact(kind="engine", engine=facts, **changes)


def test_the_text_is_what_triton_expects() -> None:
    assert config("task", artefact()) == (
        'name: "task"\n'
        'backend: "onnxruntime"\n'
        "max_batch_size: 32\n"
        "input [\n"
        "  {\n"
        '    name: "input_ids"\n'
        "    data_type: TYPE_INT64\n"
        "    dims: [ -1 ]\n"
        "  }\n"
        "]\n"
        "output [\n"
        "  {\n"
        '    name: "logits"\n'
        "    data_type: TYPE_FP32\n"
        "    dims: [ 3 ]\n"
        "  }\n"
        "]\n"
        "dynamic_batching {\n"
        "  preferred_batch_size: [ 8, 32 ]\n"
        "}\n"
    )


def test_an_engine_of_several_inputs_parses_under_the_official_names() -> None:
    mask = Port(name='odd "name"', dtype="bool", shape=("batch", "sequence"))
    scale = Port(name="scale", dtype="float16", shape=("batch",))
    shapes = ((1, 1), (4, 64), (16, 128))
    profile = {"input_ids": shapes, mask.name: shapes, "scale": ((1,), (4,), (16,))}
    made = engine("tensorrt", inputs=(IDS, mask, scale), profile=MappingProxyType(profile))
    found = parsed(config("task", made))
    assert (found.name, found.backend, found.max_batch_size) == ("task", "tensorrt", 16)
    assert [(i.name, i.data_type, list(i.dims)) for i in found.input] == [
        ("input_ids", 9, [-1]),
        ('odd "name"', 1, [-1]),
        ("scale", 10, [1]),
    ]
    assert [i.HasField("reshape") for i in found.input] == [False, False, True]
    assert [(o.name, o.data_type, list(o.dims)) for o in found.output] == [("logits", 11, [3])]
    assert list(found.dynamic_batching.preferred_batch_size) == [4, 16]
    assert [group.kind for group in found.instance_group] == [1]


@pytest.mark.parametrize(
    ("changes", "largest", "dims"),
    [
        ({"profile": {"input_ids": ((1, 1), (1, 64), (1, 512))}}, 1, [-1]),
        ({"inputs": (replace(IDS, shape=(4, "sequence")),)}, 0, [4, -1]),
        ({"outputs": (replace(LOGITS, shape=(3,)),)}, 0, [-1, -1]),
        # scores between the rows of one request, as CLIP's: joined requests would mix them
        ({"outputs": (replace(LOGITS, shape=("batch", "batch")),)}, 0, [-1, -1]),
        ({"outputs": (replace(LOGITS, shape=("batch", "2*batch + 1")),)}, 0, [-1, -1]),
    ],
)
def test_what_cannot_be_batched_is_not(changes: Any, largest: int, dims: list[int]) -> None:
    found = parsed(config("task", artefact(**changes)))
    assert found.max_batch_size == largest
    assert list(found.input[0].dims) == dims
    assert not found.HasField("dynamic_batching")


def exported(folder: Path, *made: Artefact) -> Path:
    """A folder as `kilodelta export` leaves it, with small files in the artefacts' place."""
    folder.mkdir()
    known = []
    for one in made:
        files = []
        for file in one.files:
            (folder / file.file).write_bytes(file.file.encode())
            files.append(artefacts.file_fact(folder / file.file))
        known.append(replace(one, files=tuple(files)))
    digest = "sha256:" + "1" * 64
    delta = FileFact(file="task.kd", sha256=digest, nbytes=1)
    manifest = ExportManifest(
        tool="kilodelta",
        libraries={},
        base_name="base",
        base_root=digest,
        delta=DeltaFacts(file=delta, method={"name": "lora", "rank": 1}),
        result_root=digest,
        extras=(),
        model=None,
        artefacts=tuple(known),
    )
    artefacts.write(manifest, folder)
    return folder


def test_a_served_model_has_no_input_that_a_client_may_leave_out(tmp_path: Path) -> None:
    """Each version is a merged model: there is no adapter to keep alive, to add or to freeze."""
    made = exported(tmp_path / "out", artefact())
    write_repository(made, tmp_path / "models", name="task")
    write_repository(made, tmp_path / "models", name="task")
    found = parsed((tmp_path / "models" / "task" / "config.pbtxt").read_text())
    assert [i.name for i in found.input] == [port.name for port in artefact().inputs]
    assert not any(field.name == "optional" for i in found.input for field, _ in i.ListFields())
    assert {p.name for p in (tmp_path / "models" / "task").iterdir()} == {"config.pbtxt", "1", "2"}


def named(*names: str) -> dict[str, Any]:
    facts = [FileFact(file=name, sha256="sha256:" + "0" * 64, nbytes=0) for name in names]
    return {"files": tuple(facts)}


def test_a_repository_grows_by_versions(tmp_path: Path) -> None:
    one = artefact(**named("model.fp32.onnx", "model.fp32.onnx.data"))
    source = exported(tmp_path / "out", one)
    for version in (1, 2):
        done = write_repository(source, tmp_path / "models")
        assert [(m.name, m.version, m.file) for m in done.models] == [
            ("task", version, "model.fp32.onnx")
        ]
    places = sorted(str(p.relative_to(tmp_path / "models")) for p in tmp_path.rglob("models/**/*"))
    assert places == [
        "task",
        "task/1",
        "task/1/model.fp32.onnx.data",
        "task/1/model.onnx",
        "task/2",
        "task/2/model.fp32.onnx.data",
        "task/2/model.onnx",
        "task/config.pbtxt",
    ]
    assert (tmp_path / "models/task/2/model.onnx").read_bytes() == b"model.fp32.onnx"
    assert parsed((tmp_path / "models/task/config.pbtxt").read_text()).max_batch_size == 32


def test_several_artefacts_are_models_of_their_own(tmp_path: Path) -> None:
    half = engine("tensorrt", dtype="float16", **named("model.fp16.engine"))
    rtx = engine("tensorrt_rtx", **named("model.fp32.engine"))
    brain = artefact(dtype="bfloat16", **named("model.bf16.onnx"))
    source = exported(tmp_path / "out", artefact(), half, rtx, brain)
    done = write_repository(source, tmp_path / "models", name="intent")
    assert [model.name for model in done.models] == ["intent-fp32-onnx", "intent-fp16-tensorrt"]
    assert done.left_out == (
        "model.fp32.engine: Triton does not run TensorRT-RTX engines",
        "model.bf16.onnx: Triton's ONNX Runtime back end takes no bfloat16",
    )
    assert (tmp_path / "models/intent-fp16-tensorrt/1/model.plan").is_file()


def test_what_cannot_be_served_is_refused(tmp_path: Path) -> None:
    rtx = exported(tmp_path / "rtx", engine("tensorrt_rtx", **named("model.fp32.engine")))
    with pytest.raises(ExportError, match=r"that Triton runs: model\.fp32\.engine: Triton does"):
        write_repository(rtx, tmp_path / "models")
    brain = exported(tmp_path / "bf16", artefact(dtype="bfloat16"))
    with pytest.raises(ExportError, match="back end takes no bfloat16"):
        write_repository(brain, tmp_path / "models")
    assert not (tmp_path / "models").exists()
    source = exported(tmp_path / "out", artefact())
    with pytest.raises(InputError, match=r"'\.\./x' cannot be a model's name"):
        write_repository(source, tmp_path / "models", name="../x")
    write_repository(source, tmp_path / "models")
    other = exported(tmp_path / "other", artefact(outputs=(replace(LOGITS, shape=("batch", 4)),)))
    with pytest.raises(OutputError, match="describes another model"):
        write_repository(other, tmp_path / "models")
    assert not (tmp_path / "models/task/2").exists()
    with pytest.raises(FileError, match="cannot be read"):
        write_repository(tmp_path, tmp_path / "models")
    (source / "model.fp32.onnx").write_bytes(b"another model!!")
    with pytest.raises(ProofError, match="not sha256"):
        write_repository(source, tmp_path / "models")
    assert not (tmp_path / "models/task/2").exists()


@pytest.mark.filterwarnings("default")
def test_the_command_exports_into_a_repository_that_onnx_runtime_runs(tmp_path: Path) -> None:
    for package in ("onnxscript", "onnxruntime", "transformers"):
        pytest.importorskip(package)
    import onnxruntime
    from click.testing import CliRunner

    from kilodelta.cli import main
    from kilodelta.format.methods import Lora
    from kilodelta.format.targets import Patterns
    from tests.support import pico
    from tests.support.making import delta

    base = pico.bert_classifier(tmp_path / "base")
    patterns = Patterns(include=("*dense.weight",))
    delta(base, Lora(rank=1), patterns=patterns).save(tmp_path / "task.kd")
    arguments = [str(base), str(tmp_path / "task.kd"), "-o", str(tmp_path / "out")]
    models = tmp_path / "models"
    options = ["--profile", "sequence=1,8,16", "--triton", str(models), "--json"]
    done = CliRunner().invoke(main, ["export", *arguments, *options])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)["triton"]
    assert told["models"] == [{"name": "task", "version": 1, "file": "model.fp32.onnx"}]
    session = onnxruntime.InferenceSession(
        models / "task/1/model.onnx", providers=["CPUExecutionProvider"]
    )
    found = parsed((models / "task/config.pbtxt").read_text())
    for stated, real in (
        (found.input, session.get_inputs()),
        (found.output, session.get_outputs()),
    ):
        assert [one.name for one in stated] == [one.name for one in real]
        for one, port in zip(stated, real, strict=True):
            batch, *sizes = port.shape
            assert batch == "batch"
            assert list(one.dims) == [n if isinstance(n, int) else -1 for n in sizes]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tensorrt", "sm89"], "Triton does not run TensorRT-RTX engines"),
        (["--dtype", "bf16"], "Triton's ONNX Runtime back end takes no bfloat16"),
        ([], "'my task' cannot be a model's name"),
    ],
)
def test_the_command_refuses_before_it_exports(
    options: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RTX engines alone, bfloat16 alone, and a file's name that is none for a model."""
    for package in ("torch", "onnxscript"):
        pytest.importorskip(package)
    from types import SimpleNamespace

    from click.testing import CliRunner

    from kilodelta.cli import main

    rtx = SimpleNamespace(__name__="tensorrt_rtx")
    monkeypatch.setattr("kilodelta.export.pipeline.choose", lambda *_: rtx)
    monkeypatch.setattr("kilodelta.export.pipeline._export", None)  # calling it is a TypeError
    file = "task.kd" if options else "my task.kd"
    arguments = ["base", file, "-o", str(tmp_path / "out"), "--triton", str(tmp_path / "models")]
    done = CliRunner().invoke(main, ["export", *arguments, *options])
    assert (done.exit_code, said in done.output) == (11 if options else 9, True), done.output
    assert not list(tmp_path.iterdir())


def test_what_triton_runs_is_not_refused_before() -> None:
    require_servable("task.kd", kinds=["onnx", "tensorrt_rtx"], dtypes=["float32"])
    require_servable("task.kd", kinds=["tensorrt"], dtypes=["bfloat16"])
    require_servable("task.kd", kinds=["onnx"], dtypes=["bfloat16", "float16"])
