"""Engines that devices patch in place: mapped once for a bundle, and built once for every release.

Neither needs a GPU. The bundle keeps what the engine was built for (`recipe.json`), so that a
release builds the fine-tune's engine in the same way and states its digest.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kilodelta.device.folder.bundle import Bundle, read_json
from kilodelta.device.folder.device_folder import DeviceFolder
from kilodelta.device.golden import golden
from kilodelta.device.modes import patch, runtime
from kilodelta.errors import BaseMismatchError, ExportError, InputError
from kilodelta.export.architecture import open_headed
from kilodelta.export.manifest.artefacts import file_fact
from kilodelta.export.manifest.facts import Sizes
from kilodelta.export.merge.checkpoint import merge
from kilodelta.export.onnx.make import export_template
from kilodelta.export.onnx.template import Template
from kilodelta.export.patching import rewrite
from kilodelta.export.patching.engine.build import engine_builder
from kilodelta.export.patching.engine.map import Build, EngineBuilds, make_engine_map
from kilodelta.export.patching.map import PatchMap
from kilodelta.export.patching.map_file import read_map
from kilodelta.export.tensorrt.flavour import RTX, choose
from kilodelta.files import canonical, staging, untrusted
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.files.dtypes import named
from kilodelta.files.untrusted import FieldError
from kilodelta.format.delta import Delta
from kilodelta.models import LoadedModel
from kilodelta.progress import Progress, silent

if TYPE_CHECKING:
    from kilodelta.device.make.bundling import BundleJob

_LIMIT = 1 << 20


@dataclass(frozen=True, kw_only=True)
class EngineRecipe:
    """What an engine was built for.

    Attributes:
        capabilities: GPUs, such as "sm89".
        sizes: smallest, usual and largest size of every axis that varies, by name.
        tensorrt: the version that built it.
    """

    capabilities: tuple[str, ...]
    sizes: Mapping[str, Sizes]
    tensorrt: str

    def write(self, base: Path) -> None:
        """Write it into a folder's `base/`.

        Raises:
            OutputError: the file cannot be written.
        """
        table = {
            "capabilities": list(self.capabilities),
            "sizes": {axis: list(three) for axis, three in self.sizes.items()},
            "tensorrt": self.tensorrt,
        }
        staging.write(base / patch.RECIPE, canonical.dumps(table).encode())


def read_recipe(base: Path) -> EngineRecipe:
    """Read the recipe in a folder's `base/`.

    Raises:
        DeviceError: it is missing or damaged.
    """
    return read_json(base / patch.RECIPE, _LIMIT, _recipe)


def _recipe(value: Any) -> EngineRecipe:
    table = untrusted.table(value, "recipe", {"capabilities", "sizes", "tensorrt"})
    sizes = untrusted.mapping(table["sizes"], "sizes")
    return EngineRecipe(
        capabilities=untrusted.texts(table["capabilities"], "capabilities"),
        sizes={axis: _sizes(three, f"sizes.{axis:.80}") for axis, three in sizes.items()},
        tensorrt=untrusted.text(table["tensorrt"], "tensorrt"),
    )


def _sizes(value: Any, where: str) -> Sizes:
    three = untrusted.listed(value, where, untrusted.whole)
    if len(three) != 3:
        raise FieldError(f"{where} is not a smallest, a usual and a largest size")
    return three[0], three[1], three[2]


def map_engine(job: BundleJob, template: Template, base: Path) -> PatchMap:
    """Build the engine of a bundle into its `base/`, with its recipe, and return its map.

    Raises:
        ExportError: this engine cannot be patched: another TensorRT, or its weights are not kept.
    """
    if job.trt.__name__ != RTX:
        raise ExportError(
            f"patch mode changes engines of TensorRT-RTX, and {job.trt.__name__} would build here",
            fix="give --flavour tensorrt_rtx, or take --mode refit",
        )
    settings = job.settings
    recipe = EngineRecipe(
        capabilities=settings.capabilities,
        sizes=dict(template.sizes),
        tensorrt=job.trt.__version__,
    )
    recipe.write(base)
    return make_engine_map(
        base / runtime.ENGINE,
        job.base,
        _builder(job.trt, template, job.headed.weights, recipe),
        dtype=named(settings.dtype).name,
        weights=template.weights,
        heads=job.headed.heads,
        unused=template.unused,
        progress=job.progress,
    )


def _builder(trt: Any, template: Template, weights: Checkpoint, recipe: EngineRecipe) -> Build:
    return engine_builder(trt, template, weights, capabilities=recipe.capabilities)


def built_digests(
    folders: Sequence[str | os.PathLike[str]],
    base: Checkpoint,
    delta: Delta,
    *,
    model: str | None = None,
    config: str | None = None,
    outputs: Sequence[str] = (),
    progress: Progress = silent,
) -> dict[str, str]:
    """Build a fine-tune's engine for each device folder, and return what its release states.

    Args:
        folders: device folders in patch mode with an engine.
        base: the checkpoint.
        delta: the fine-tune.
        model, config, outputs: as the bundle was given them.
        progress: called after each build.

    Returns:
        Entries of `made`: for each engine the digest of the fine-tune's engine, which was built.

    Raises:
        InputError: a folder has no engine that is patched.
        BaseMismatchError: a folder is of another base.
        ExportError: the fine-tune changes what has no place in the engine; this machine has another
            TensorRT; or no build is the patched engine.
    """
    made: dict[str, str] = {}
    for folder in folders:
        device = DeviceFolder.open(folder)
        _require_patched(device, delta)
        with staging.scratch() as work:
            patched = work / runtime.ENGINE
            places = read_map(device.base / patch.MAP)
            engine = device.base / runtime.ENGINE
            rewrite.patch(engine, delta, patched, places=places, base=base)
            fact = file_fact(patched)
            loaded = open_headed(base, config=config, model=model).loaded.choosing(outputs)
            template = _template(device, loaded)
            merged = work / ("merged" if base.path.is_dir() else "merged.safetensors")
            merge(base, delta, merged)
            builds = EngineBuilds(_again(device, template, Checkpoint.open(merged)), work, progress)
            builds.require_build({}, patched.read_bytes(), "this fine-tune")
        made[f"{patch.BUILT}{places.files[0].sha256}"] = fact.sha256
    return made


def _require_patched(device: DeviceFolder, delta: Delta) -> None:
    bundle: Bundle = device.bundle
    if bundle.mode != "patch" or not runtime.is_engine(bundle):
        raise InputError(
            f"{device.root} has no engine that is patched: it is in {bundle.mode} mode, "
            f"for {bundle.runtime}",
            fix="leave --engine out for it, or give a folder of bundle --mode patch --engine",
        )
    if bundle.base_root != delta.manifest.base.root:
        raise BaseMismatchError(
            f"{device.root} is of another base: {bundle.base_root}, not {delta.manifest.base.root}",
            fix="give the device folder that was bundled from this base",
        )


def _again(device: DeviceFolder, template: Template, weights: Checkpoint) -> Build:
    """Make a builder of this folder's engine, by the same TensorRT."""
    recipe = read_recipe(device.base)
    trt = choose(device.bundle.runtime, recipe.capabilities, (device.bundle.dtype,))
    if trt.__version__ != recipe.tensorrt:
        raise ExportError(
            f"the engine is of {trt.__name__} {recipe.tensorrt}, and this machine has "
            f"{trt.__version__}",
            fix=f"install {trt.__name__} {recipe.tensorrt}, or bundle again",
        )
    return _builder(trt, template, weights, recipe)


def _template(device: DeviceFolder, loaded: LoadedModel) -> Template:
    inputs = golden.read(device.base / golden.FILE).inputs
    batch = {name: torch.from_numpy(array) for name, array in inputs.items()}
    sizes = read_recipe(device.base).sizes
    return export_template(loaded, batch, dtype=device.bundle.dtype, sizes=sizes)
