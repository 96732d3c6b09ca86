"""Export the fine-tunes of one base from one exported graph, which is traced once for all of them.

`export_shared` writes the base's ONNX file, the map of its weights, what `rest` of the base the
file does not hold exactly, and the facts of the graph. A fine-tune is then patched into that file,
which gives the bytes of an export of the merged model, and `export_from_shared` builds its engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from kilodelta.errors import ExportError, require
from kilodelta.export.manifest import artefacts
from kilodelta.export.manifest.artefacts import file_fact
from kilodelta.export.manifest.describe import export_manifest
from kilodelta.export.manifest.facts import Artefact, EngineFacts, ExportManifest
from kilodelta.export.manifest.json_text import artefact_text, parse_artefact
from kilodelta.export.options import short
from kilodelta.export.out_folder import out_folder
from kilodelta.export.patching.map_file import read_map, write_map
from kilodelta.export.patching.plan import make_plan
from kilodelta.export.patching.rewrite import Patched, patch
from kilodelta.export.tensorrt.build import build
from kilodelta.export.tensorrt.flavour import AUTO, choose
from kilodelta.files import plain
from kilodelta.format.delta import Delta
from kilodelta.format.file import load

MODEL, MAP, REST, FACTS = "model.onnx", "model.map.json", "rest.safetensors", "model.facts.json"


def export_shared(
    base: Path, out: Path, *, dtype: str, model: str | None = None, inputs: str | None = None
) -> int:
    """Trace a base once, and write what its fine-tunes are exported from.

    Args:
        base: the model, a folder or a `.safetensors` file.
        out: an existing folder.
        dtype: "float32", "float16" or "bfloat16".
        model: `package.module:function` that builds the module.
        inputs: what to trace with, where the model does not say what its inputs look like.

    Returns:
        How many weights the graph holds; 0 for a model that is exported as an encoder and a
        decoder, for which nothing is written.

    Raises:
        ExportError: the model cannot be exported.
        InputError: it does not say what its inputs look like.
        MissingPackageError: torch or onnxscript is needed.
    """
    require("torch", extra="onnx", why="export models")
    from kilodelta.export.onnx.make import export_template
    from kilodelta.export.onnx.save import save
    from kilodelta.export.onnx.template import fill_template
    from kilodelta.export.patching.make_map import make_map, write_rest
    from kilodelta.models import open_model, read_inputs
    from kilodelta.models.generation.seq2seq import is_seq2seq

    loaded = open_model(model or str(base), weights=base if model else None)
    if inputs is None and is_seq2seq(loaded):
        return 0
    batch = None if inputs is None else read_inputs(inputs, loaded, limit=2, batch_size=2)[0]
    template = export_template(loaded, batch, dtype=dtype)
    files = save(fill_template(template, base), out / MODEL)
    places = make_map(out / MODEL, base, unused=template.unused)
    write_map(places, out / MAP)
    write_rest(places, base, out / REST)
    facts = Artefact(
        kind="onnx",
        dtype=template.dtype,  # type: ignore[arg-type]
        files=tuple(map(file_fact, files)),
        inputs=template.inputs,
        outputs=template.outputs,
        profile=template.profile(),
    )
    (out / FACTS).write_bytes(artefact_text(facts))
    return len(template.weights)


def patch_shared(shared: Path, delta: Path | Delta, out: Path) -> Patched:
    """Write a fine-tune's ONNX file: the bytes of an export of the merged model.

    Args:
        shared: the folder that `export_shared` wrote.
        delta: the fine-tune.
        out: a new path.

    Raises:
        ExportError: nothing was traced, or what the fine-tune changes has no place in the graph.
        BaseMismatchError, ProofError, OutputError: as `kilodelta.export.patching.rewrite.patch`.
    """
    if not (shared / MODEL).exists():
        raise ExportError(
            "this base is exported as an encoder and a decoder, into which nothing is patched",
            fix="give inputs in [base.NAME]: the whole model is then one graph",
        )
    places, rest = read_map(shared / MAP), shared / REST
    return patch(shared / MODEL, delta, out, places=places, base=rest if rest.exists() else None)


def is_takeable(shared: Path, delta: Delta) -> bool:
    """Return whether a fine-tune can be exported from a shared graph.

    It cannot where it changes the configuration, and so maybe the graph, or a tensor that has no
    place in the graph.

    Raises:
        BaseMismatchError: the graph is of another base.
    """
    if delta.manifest.config or not (shared / FACTS).exists():
        return False
    rest = shared / REST
    try:
        places = read_map(shared / MAP)
        make_plan(shared / MODEL, delta, places, rest if rest.exists() else None)
    except ExportError:
        return False
    return True


def export_from_shared(
    shared: Path, delta: Path, out: Path, *, tensorrt: Sequence[str], model: str | None = None
) -> ExportManifest:
    """Write what `export(..., onnx=True, tensorrt=...)` writes, without tracing or merging.

    Args:
        shared: the folder that `export_shared` wrote, of which `is_takeable` is true.
        delta: the `.kd` file.
        out: a new folder.
        tensorrt: GPUs to build one engine for.
        model: `package.module:function` that built the module, for the manifest.

    Raises:
        ExportError: TensorRT refuses the model.
        MissingPackageError: TensorRT is not installed.
        BaseMismatchError, ProofError, OutputError: as `patch_shared`.
    """
    facts = parse_artefact(plain.read(shared / FACTS, artefacts.LIMIT))
    capabilities, tuned = tuple(tensorrt), load(delta)
    trt = choose(AUTO, capabilities, (facts.dtype,))
    with out_folder(out, force=False) as stage:
        source = stage / f"model.{short(facts.dtype)}.onnx"
        written = patch_shared(shared, tuned, source)
        onnx = replace(facts, files=tuple(map(file_fact, written.files)))
        path = source.with_suffix(".engine")
        build(trt, source, path, capabilities=capabilities, profile=facts.profile)
        engine = EngineFacts(
            flavour=trt.__name__,
            version=trt.__version__,
            capabilities=capabilities,
            tf32=False,
            refittable=(),
            onnx=onnx.files[0].sha256,
        )
        built = replace(onnx, kind="engine", files=(file_fact(path),), engine=engine)
        manifest = export_manifest(tuned, delta, model, [onnx, built])
        artefacts.write(manifest, stage)
    return manifest
