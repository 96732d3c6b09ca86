"""Do one task with the library's functions, into a separate folder.

Each function takes the task's parameters and an empty folder, and returns plain JSON for the
record. Heavy libraries are imported by `preload`, in the process that children are forked from.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kilodelta.errors import require
from kilodelta.fleet.task import DEVICE, PAGE

Params = Mapping[str, Any]
ENGINE, EXPORT = "engine", "export"
"""Folders of an engine, its ONNX file and their manifest, and of an ONNX file and its manifest."""
PRELOAD: Mapping[str, tuple[str, ...]] = {
    "compress": ("torch", "transformers", "kilodelta.compress.distill.compress"),
    "onnx-base": ("torch", "transformers", "onnxscript", "kilodelta.export.pipeline"),
    "tensorrt": ("kilodelta.export.one_graph", "kilodelta.exact.selftest"),
    "onnx": ("kilodelta.export.one_graph", "kilodelta.exact.selftest"),
    "merge": ("kilodelta.export.merge.checkpoint",),
    "peft": ("kilodelta.export.peft.adapter",),
    "gguf": ("kilodelta.export.gguf.adapter", "gguf"),
    "adapter": ("torch", "transformers", "onnxscript", "kilodelta.export.adapter.folder"),
    "release": ("torch", "transformers", "kilodelta.device.make.release"),
    "bundle": ("torch", "transformers", "onnxscript", "kilodelta.device.make.build"),
}


def preload(kinds: set[str]) -> list[str]:
    """Return the modules that children of these kinds need, those that are installed."""
    names = dict.fromkeys(name for kind in sorted(kinds) for name in PRELOAD[kind])
    return [name for name in names if importlib.util.find_spec(name.partition(".")[0])]


def compress(p: Params, out: Path) -> dict[str, Any]:
    """Distil a tuned model; the record holds what `kilodelta compress --json` prints."""
    require("torch", extra="hf", why="train a delta's coefficients")
    from kilodelta.compress.distill.compress import compress
    from kilodelta.fleet.compression import compression_options

    learns = p["inputs"] is not None
    options = compression_options(p["options"], learns=learns, labels=p["labels"], model=p["model"])
    report = compress(
        p["base"], p["tuned"], out / f"{p['name']}.kd", inputs=p["inputs"], options=options
    )
    result = report.to_json()
    if importlib.util.find_spec("matplotlib"):
        from kilodelta.report import write_report

        write_report(out / PAGE, "compress", {**result, "commands": ["kilodelta fleet run"]})
    return result


def onnx_base(p: Params, out: Path) -> dict[str, Any]:
    """Export the base once, and map its weights, so that fine-tunes are patched in."""
    from kilodelta.export.one_graph import export_shared
    from kilodelta.export.options import SHORT

    weights = export_shared(
        Path(p["base"]), out, dtype=SHORT[p["dtype"]], model=p["model"], inputs=p["inputs"]
    )
    return {"weights": weights}


def onnx(p: Params, out: Path) -> dict[str, Any]:
    """Patch a fine-tune into the base's ONNX file: the bytes of an export of the merged model.

    A quantised base has no such file, and its fine-tune is exported.
    """
    from kilodelta.export.one_graph import MODEL, patch_shared

    if "template" not in p:
        return _exported(p, out / EXPORT, ())
    made = patch_shared(Path(p["template"]), Path(p["delta"]), out / MODEL)
    return {"changed": made.targets + made.extras}


def tensorrt(p: Params, out: Path) -> dict[str, Any]:
    """Build an engine from the base's graph; export anew what has no place in that graph."""
    from kilodelta.export.one_graph import export_from_shared, is_takeable
    from kilodelta.format.file import load

    delta, gpus = Path(p["delta"]), p["options"]["for"]
    if "template" in p and is_takeable(Path(p["template"]), load(delta)):
        made = export_from_shared(
            Path(p["template"]), delta, out / ENGINE, tensorrt=gpus, model=p["model"]
        )
        return {"artefacts": len(made.artefacts), "traced": False}
    return _exported(p, out / ENGINE, gpus)


def _exported(p: Params, out: Path, gpus: Sequence[str]) -> dict[str, Any]:
    require("torch", extra="onnx", why="export models")
    from kilodelta.export.pipeline import export

    made = export(
        p["base"],
        p["delta"],
        out,
        onnx=True,
        tensorrt=gpus,
        dtype=[p["options"].get("dtype", "fp32")],
        model=p["model"],
        inputs=p["inputs"],
    )
    return {"artefacts": len(made.manifest.artefacts), "traced": True}


def merge(p: Params, out: Path) -> dict[str, Any]:
    """Merge into a folder, or a file where the base is one."""
    from kilodelta.export.merge.checkpoint import merge

    name = "merged.safetensors" if Path(p["base"]).is_file() else "merged"
    made = merge(p["base"], p["delta"], out / name)
    return {"targets": made.targets}


def peft(p: Params, out: Path) -> dict[str, Any]:
    """Write a PEFT LoRA adapter."""
    from kilodelta.export.options import SHORT
    from kilodelta.export.peft.adapter import PeftOptions, export_peft

    options = PeftOptions(
        dtype=SHORT[p["options"].get("dtype", "fp32")], svd=p["options"].get("svd")
    )
    made = export_peft(p["base"], p["delta"], out / "adapter", options)
    return {"rank": made.rank, "error": made.error}


def gguf(p: Params, out: Path) -> dict[str, Any]:
    """Write a GGUF LoRA adapter."""
    from kilodelta.export.gguf import export_gguf
    from kilodelta.export.options import SHORT

    made = export_gguf(
        p["base"],
        p["delta"],
        out / f"{p['name']}.gguf",
        dtype=SHORT[p["options"].get("dtype", "fp32")],
        svd=p["options"].get("svd"),
    )
    return {"rank": made.rank, "error": made.error}


def adapter(p: Params, out: Path) -> dict[str, Any]:
    """Write an `.onnx_adapter` file beside a graph of the base."""
    from kilodelta.export.adapter.folder import AdapterOptions, export_adapter
    from kilodelta.export.options import SHORT

    given = {"dtype": SHORT[p["options"].get("dtype", "fp32")], "model": p["model"]}
    if "rank" in p["options"]:
        given["rank"] = p["options"]["rank"]
    made = export_adapter(p["base"], p["delta"], out / "adapter", AdapterOptions(**given))
    return {"rank": getattr(made, "rank", None)}


def release(p: Params, out: Path) -> dict[str, Any]:
    """Write a release with a version and, unless it is told not to, a probe."""
    from kilodelta.device.make.release import release

    version = p["options"]["version"]
    made = release(
        p["base"],
        p["delta"],
        out / f"{p['name']}-{version}.kd",
        version=version,
        inputs=p["inputs"] if p["options"].get("probe", True) else None,
        model=p["model"],
        outputs=p["options"].get("bundle", {}).get("outputs", ()),
        engine=_patched_engines(p),
    )
    return {"version": made.version, "dtypes": list(made.dtypes)}


def _patched_engines(p: Params) -> list[str]:
    """Return the device folder whose engine is patched, if the release goes to such a one."""
    wanted = p["options"].get("bundle", {})
    return [p["device"]] if wanted.get("mode") == "patch" and wanted.get("engine") else []


def bundle(p: Params, out: Path) -> dict[str, Any]:
    """Make the device folder that all fine-tunes of a base are released for."""
    from kilodelta.device.make.build import bundle

    options = {"name": p["name"], "model": p["model"], "probe": p["inputs"], **p["options"]}
    made = bundle(p["base"], out / DEVICE, **options)
    return {"mode": made.mode, "runtime": made.runtime}


WORK: Mapping[str, Callable[[Params, Path], dict[str, Any]]] = {
    "compress": compress,
    "onnx-base": onnx_base,
    "onnx": onnx,
    "tensorrt": tensorrt,
    "merge": merge,
    "peft": peft,
    "gguf": gguf,
    "adapter": adapter,
    "release": release,
    "bundle": bundle,
}
