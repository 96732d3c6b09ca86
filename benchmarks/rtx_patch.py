"""Patching a TensorRT-RTX engine beside building it again; and how often engines can be patched.

    nice python benchmarks/rtx_patch.py [--dtype fp16] [--json FILE]
    nice python benchmarks/rtx_patch.py --survey [--only NAME,NAME] [--json FILE]

The first form takes all-MiniLM-L6-v2 and a fine-tune of its 36 matrices; `--large` takes a model
of DistilBERT's size with random weights. Printed, ratios first:

- a rebuild of the fine-tune's engine over patching it, in one run (wanted: 50), from the same
  files: the `.kd` file is merged and the engine built, without exporting the graph, which exists;
  or read with the map, and the engine patched as a device does it. Also without the merge;
- an export over patching: what `kilodelta export --tensorrt` does for the same fine-tune, which
  merges, opens the model, traces it and builds, in a process that has done so before;
- the floor: the same bytes copied, hashed by a second thread, synced and named, and nothing
  computed, by the calls that patching uses; what a rebuild is over that no patch can exceed. With
  `--folder` on a memory file system (/dev/shm) the disk is left out;
- memory that patching takes, over the engine's bytes (wanted: at most 1.2);
- bytes that differ between the patched engine and the built one (wanted: 0).

The survey maps small models of many architectures in two precisions, each in a process of its own:
how many of their weight matrices and vectors have a place, and in how many bytes a patched
fine-tune differs from its build. No GPU is needed.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from machine import describe, peak_memory

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

CAPABILITIES = ("sm86",)
DTYPES = ("float32", "float16")
ROW_SECONDS = 900
"""Given to one model in one precision."""

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
DISTIL = {"vocab_size": 96, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48}
GPT = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
VISION = {**SMALL, "image_size": 16, "patch_size": 8}
MODELS: dict[str, dict[str, Any]] = {
    "bert": SMALL,
    "roberta": SMALL,
    "electra": {**SMALL, "embedding_size": 32},
    "albert": {**SMALL, "embedding_size": 16},
    "mpnet": SMALL,
    "distilbert": DISTIL,
    "ernie": SMALL,
    "convbert": {**SMALL, "embedding_size": 32},
    "gpt2": GPT,
    "gpt_neox": SMALL,
    "opt": {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "llama": {**SMALL, "num_key_value_heads": 1},
    "mistral": {**SMALL, "num_key_value_heads": 1},
    "qwen2": {**SMALL, "num_key_value_heads": 1},
    "phi": SMALL,
    "stablelm": {**SMALL, "num_key_value_heads": 2},
    "vit": VISION,
    "deit": VISION,
    "dinov2": {**VISION, "mlp_ratio": 2},
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_channels": 3},
    "convnext": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
}
"""Architectures by their `model_type`, and sizes."""


LARGE = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
}
"""A BERT of DistilBERT's size: 66 million numbers."""


def minilm() -> Path:
    from fidelity_task import base_folder

    return base_folder()


def make_model(kind: str, folder: Path, sizes: Mapping[str, Any] | None = None) -> Path:
    """Write a small model of an architecture, whose weights are all random."""
    import torch
    from transformers import AutoConfig, AutoModel

    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model(kind, **(sizes or MODELS[kind])))
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape) * 0.1 + 0.5 * (tensor.dim() == 1))
    model.eval().save_pretrained(folder)
    return folder


def example(kind: str) -> Any:
    import torch

    return (
        None
        if "vocab_size" in MODELS[kind] and "image_size" not in MODELS[kind]
        else {
            "pixel_values": torch.randn(2, 3, 16 if "image_size" in MODELS[kind] else 32, 32)[
                :, :, :, : 16 if "image_size" in MODELS[kind] else 32
            ]
        }
    )


def tune(base: Path, names: list[str]) -> Any:
    """A fine-tune that changes these tensors."""
    from kilodelta.format.methods import Lora
    from kilodelta.format.targets import Patterns
    from tests.support import making

    return making.delta(base, Lora(rank=2), patterns=Patterns(include=tuple(names)))


class Engine:
    """A base's engine with its map, and what builds further ones."""

    def __init__(self, base: Path, folder: Path, dtype: str, batch: Any) -> None:
        from kilodelta.export.onnx.make import export_template
        from kilodelta.export.patching.engine.build import engine_builder
        from kilodelta.export.patching.engine.map import make_engine_map
        from kilodelta.export.patching.make_map import write_rest
        from kilodelta.export.tensorrt.flavour import RTX, choose
        from kilodelta.files.checkpoint import Checkpoint
        from kilodelta.files.dtypes import named
        from kilodelta.models import open_model

        loaded = open_model(str(base))
        self.base, self.folder, self.path = base, folder, folder / "model.engine"
        self.template = export_template(loaded, batch, dtype=dtype)
        trt = choose(RTX, CAPABILITIES, (dtype,))
        checkpoint = Checkpoint.open(base)
        self.build = engine_builder(trt, self.template, checkpoint, capabilities=CAPABILITIES)
        self.builds = 0
        self.places = make_engine_map(
            self.path,
            checkpoint,
            self.build,
            dtype=named(dtype).name,
            weights=self.template.weights,
            unused=self.template.unused,
            progress=self._count,
        )
        self.rest = write_rest(self.places, base, folder / "rest.safetensors")

    def _count(self, event: Any) -> None:
        self.builds = event.done

    def placed(self, *, matrices: bool) -> list[str]:
        """Names of weights that have a place, of one kind."""
        tensors = self.places.tensors
        return [n for n in self.places.places if (len(tensors[n].shape) > 1) == matrices]

    def patch(self, delta: Any, out: Path) -> None:
        from kilodelta.export.patching.rewrite import patch

        patch(self.path, delta, out, places=self.places, base=self.rest)

    def merged(self, delta: Any) -> dict[str, Any]:
        """The changed tensors of a fine-tune."""
        from kilodelta.export.merge.checkpoint import merge
        from kilodelta.files.checkpoint import Checkpoint

        is_folder = self.base.is_dir()
        out = self.folder / ("merged" if is_folder else "merged.safetensors")
        merge(self.base, delta, out)
        checkpoint = Checkpoint.open(out)
        return {name: checkpoint.raw(name) for name in self.template.weights}

    def differing(self, delta: Any, patched: bytes) -> tuple[int, float]:
        """Bytes in which the fine-tune's engine differs from a build, and a build's seconds."""
        import numpy as np

        from kilodelta.export.patching.engine.builds import PROOFS

        tensors, fewest, seconds = self.merged(delta), len(patched), []
        for number in range(PROOFS):
            out = self.folder / f"built{number}.engine"
            began = time.perf_counter()
            self.build(tensors, out)
            seconds.append(time.perf_counter() - began)
            data = out.read_bytes()
            if len(data) == len(patched):
                pair = (np.frombuffer(data, np.uint8), np.frombuffer(patched, np.uint8))
                fewest = min(fewest, int((pair[0] != pair[1]).sum()))
            if fewest == 0:
                break
        return fewest, min(seconds)


def survey_one(kind: str, dtype: str) -> dict[str, Any]:
    """Map one small model and patch a fine-tune of all matrices that have a place."""
    from kilodelta.errors import KiloDeltaError

    row: dict[str, Any] = {"model": kind, "dtype": dtype}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        base = make_model(kind, folder / "base")
        began = time.perf_counter()
        try:
            engine = Engine(base, folder, dtype, example(kind))
        except KiloDeltaError as error:
            return {**row, "refused": error.what.splitlines()[0]}
        weights = engine.template.weights
        vectors, matrices = engine.placed(matrices=False), engine.placed(matrices=True)
        row |= {
            "matrices": sum(len(shape) > 1 for shape in weights.values()),
            "matrices_placed": len(matrices),
            "vectors": sum(len(shape) < 2 for shape in weights.values()),
            "vectors_placed": len(vectors),
            "builds": engine.builds,
            "seconds": round(time.perf_counter() - began, 1),
        }
        delta = tune(base, matrices)
        out = folder / "patched.engine"
        began = time.perf_counter()
        engine.patch(delta, out)
        row["patch_seconds"] = round(time.perf_counter() - began, 4)
        row["engine_bytes"] = out.stat().st_size
        row["bytes_that_differ"], seconds = engine.differing(delta, out.read_bytes())
        row["build_seconds"] = round(seconds, 3)
        others = [n for n, shape in weights.items() if len(shape) > 1 and n not in matrices]
        row["refused_by_name"] = sum(is_refused(engine, base, name) for name in others)
    return row


def is_refused(engine: Engine, base: Path, name: str) -> bool:
    """Return whether a fine-tune of a matrix without a place is refused by its name."""
    from kilodelta.errors import ExportError

    try:
        engine.patch(tune(base, [name]), engine.folder / "refused.engine")
    except ExportError as error:
        return name in error.what
    return False


def survey(kinds: list[str], results: Path | None) -> list[dict[str, Any]]:
    """Map each model and precision in a process of its own, which may fail alone.

    Args:
        kinds: architectures.
        results: a file that is written after each row; rows that it holds are not made again.
    """
    rows: list[dict[str, Any]] = []
    if results is not None and results.exists():
        rows = json.loads(results.read_text())["rows"]
    done = {(row["model"], row["dtype"]) for row in rows}
    for kind, dtype in itertools.product(kinds, DTYPES):
        if (kind, dtype) in done:
            continue
        arguments = [sys.executable, __file__, "--one", kind, "--dtype", dtype]
        rows.append({"model": kind, "dtype": dtype} | in_a_process(arguments))
        print(json.dumps(rows[-1]), flush=True)
        if results is not None:
            write_results(results, {"rows": rows})
    return rows


def in_a_process(arguments: list[str]) -> dict[str, Any]:
    """Run what prints a row, in a process of its own; an end of it is a row that says so."""
    try:
        done = subprocess.run(
            arguments, capture_output=True, text=True, check=False, timeout=ROW_SECONDS
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {ROW_SECONDS} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        row: dict[str, Any] = json.loads(lines[-1])
        return row
    failed = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:200]
    return {"failed": failed}


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Write what was measured, and on which machine."""
    path.write_text(json.dumps({"machine": describe(), **results}, indent=2) + "\n")


def beside_a_build(base: Path, dtype: str, place: Path | None = None) -> dict[str, Any]:
    """Patch and build one fine-tune of all matrices of the encoder, from the same files."""
    from kilodelta.export.merge.checkpoint import merge
    from kilodelta.export.patching.map_file import write_map
    from kilodelta.format.file import load

    with tempfile.TemporaryDirectory(dir=place) as temporary:
        folder = Path(temporary)
        engine = Engine(base, folder, dtype, None)
        names = [n for n in engine.placed(matrices=True) if "encoder.layer" in n]
        delta = tune(base, names)
        delta.save(folder / "task.kd")
        write_map(engine.places, folder / "map.json")
        engine.patch(delta, folder / "first.engine")
        data = (folder / "first.engine").read_bytes()
        began = time.perf_counter()
        merge(base, load(folder / "task.kd"), folder / "again")
        merged = time.perf_counter() - began
        differ, build = engine.differing(delta, data)
        promised = f"sha256:{hashlib.sha256(data).hexdigest()}"
        on_device(engine, folder, "warm", promised)  # kernels are loaded
        seconds = [on_device(engine, folder, str(number), promised) for number in range(7)]
        floors = [floor(folder / "0.engine", folder / f"f{n}", promised) for n in range(7)]
        with peak_memory() as peak:
            before = peak()
            on_device(engine, folder, "memory", promised)
            memory = peak() - before
        assert (folder / "0.engine").read_bytes() == data
        exports = [exported(base, folder / "task.kd", folder / f"e{n}", dtype) for n in range(2)]
    return {
        "rebuild_over_patch": (merged + build) / min(seconds),
        "build_over_patch": build / min(seconds),
        "export_over_patch": exports[-1] / min(seconds),
        "rebuild_over_floor": (merged + build) / min(floors),
        "patch_over_floor": min(seconds) / min(floors),
        "memory_over_engine": memory / len(data),
        "bytes_that_differ": differ,
        "engine_bytes": len(data),
        "matrices": len(names),
        "patch_seconds": min(seconds),
        "patch_seconds_each": [round(one, 4) for one in seconds],
        "floor_seconds": min(floors),
        "build_seconds": build,
        "merge_seconds": merged,
        "export_seconds": exports[-1],
        "in_the_clock_of_the_patch": "map and .kd read, base and delta matched, weights computed, "
        "engine written, every byte hashed against the stated digest, fsync, name given",
        "in_the_clock_of_the_rebuild": "the same .kd merged into a checkpoint; its weights put "
        "into the ONNX graph that exists, and the engine built; the least of the builds",
        "in_the_clock_of_the_export": "the same .kd and base to an engine, by "
        "kilodelta.export.export; the second time, with all libraries loaded",
        "builds_for_the_map": engine.builds,
        "dtype": dtype,
    }


def exported(base: Path, delta: Path, out: Path, dtype: str) -> float:
    """Export a fine-tune to an engine as the command does, and return the seconds."""
    from kilodelta.export import export
    from kilodelta.export.options import short

    began = time.perf_counter()
    export(base, delta, out, tensorrt=CAPABILITIES, dtype=short(dtype))
    return time.perf_counter() - began


def on_device(engine: Engine, folder: Path, name: str, promised: str) -> float:
    """Patch as a device does, from files, and return the seconds."""
    from kilodelta.export.patching.map_file import read_map
    from kilodelta.export.patching.rewrite import patch

    began = time.perf_counter()
    patch(
        engine.path,
        folder / "task.kd",
        folder / f"{name}.engine",
        places=read_map(folder / "map.json"),
        base=engine.rest,
        promised=promised,
    )
    return time.perf_counter() - began


def floor(source: Path, out: Path, promised: str) -> float:
    """Copy and hash an engine as a patch does, with nothing to compute; return the seconds."""
    from kilodelta.export.patching.promised import digest_of
    from kilodelta.files import staging
    from kilodelta.files.copying import copy_range

    began = time.perf_counter()
    count = source.stat().st_size
    with (
        staging.new_file(out) as stage,
        source.open("rb") as read,
        stage.open("xb+") as written,
        ThreadPoolExecutor(1) as pool,
    ):
        hashed = pool.submit(digest_of, read.fileno())
        done = 0
        while done < count:
            done += copy_range(read.fileno(), written.fileno(), count - done, done, done)
        assert hashed.result() == promised
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="float16", choices=DTYPES)
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--survey", action="store_true")
    parser.add_argument("--only", default=",".join(MODELS))
    parser.add_argument("--one", choices=MODELS)
    parser.add_argument("--folder", type=Path, help="where engines are patched")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(survey_one(given.one, given.dtype)))
        return
    if given.survey:
        survey(given.only.split(","), given.json)
        return
    with tempfile.TemporaryDirectory() as temporary:
        base = make_model("bert", Path(temporary) / "base", LARGE) if given.large else minilm()
        found = beside_a_build(base, given.dtype, given.folder)
    found["model"] = "BERT of DistilBERT's size" if given.large else "all-MiniLM-L6-v2"
    print(
        f"a rebuild over patching {found['rebuild_over_patch']:.0f}x (wanted 50), "
        f"without merging {found['build_over_patch']:.0f}x\n"
        f"an export to an engine over patching {found['export_over_patch']:.0f}x\n"
        f"a rebuild over copying, hashing and syncing alone {found['rebuild_over_floor']:.0f}x, "
        f"which a patch takes {found['patch_over_floor']:.1f} times\n"
        f"memory over the engine's bytes {found['memory_over_engine']:.2f} (at most 1.2)\n"
        f"{found['bytes_that_differ']} of {found['engine_bytes']} bytes differ"
    )
    if given.json:
        write_results(given.json, found)


if __name__ == "__main__":
    main()
