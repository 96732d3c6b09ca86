"""Engines that devices patch in place: mapped once for a bundle, and built once for every release.

Neither needs a GPU. The bundle keeps what the engine was built for (`recipe.json`), so that a
release builds the fine-tune's engine in the same way and states its digest.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
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
from kilodelta.export.merge.room import merged_need
from kilodelta.export.onnx.make import export_template
from kilodelta.export.onnx.template import Template
from kilodelta.export.patching import rewrite
from kilodelta.export.patching.engine.apart import require_built
from kilodelta.export.patching.engine.build import engine_builder
from kilodelta.export.patching.engine.builds import Build, EngineBuilds
from kilodelta.export.patching.engine.map import make_engine_map
from kilodelta.export.patching.map import PatchMap
from kilodelta.export.patching.map_file import read_map
from kilodelta.export.patching.plan import WAY_OUT, WAY_OUT_OF_CODES
from kilodelta.export.quantised.graph import settled
from kilodelta.export.tensorrt.flavour import RTX, choose
from kilodelta.files import canonical, staging, untrusted
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.files.dtypes import named
from kilodelta.files.untrusted import FieldError
from kilodelta.format.delta import Delta
from kilodelta.grid.dequantise import float_folder
from kilodelta.grid.model import QuantisedModel
from kilodelta.grid.open import is_quantised, open_quantised
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
    settled(settings.blocks, for_engines=True)
    build = engine_builder(
        job.trt,
        template,
        job.headed.weights,
        capabilities=recipe.capabilities,
        quantised=job.quantised,
        leave=job.headed.heads,
    )
    return make_engine_map(
        base / runtime.ENGINE,
        job.quantised or job.base,
        build,
        dtype=named(settings.dtype).name,
        weights=template.weights,
        heads=job.headed.heads,
        unused=template.unused,
        progress=job.progress,
    )


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
        places = _require_patched(device, delta)
        with staging.scratch() as work:
            patched = work / runtime.ENGINE
            engine = device.base / runtime.ENGINE
            staging.require_room(*_needs_of(work, engine, base, delta))
            rest = base if places.outline is None else _rest(device)
            rewrite.patch(engine, delta, patched, places=places, base=rest)
            fact = file_fact(patched)
            merged = work / ("merged" if base.path.is_dir() else "merged.safetensors")
            merge(base, delta, merged)
            with ExitStack() as room:
                values = _values(base, work, room)
                loaded = open_headed(values, config=config, model=model).loaded.choosing(outputs)
                template = _template(device, loaded)
                build = _again(device, template, merged, work, room)
                way_out = WAY_OUT if places.outline is None else WAY_OUT_OF_CODES
                builds = EngineBuilds(build, work, progress, way_out=way_out)
                dtype = named(device.bundle.dtype).name
                require_built(builds, patched.read_bytes(), places, _opened(merged), dtype)
        made[f"{patch.BUILT}{places.files[0].sha256}"] = fact.sha256
    return made


def _needs_of(work: Path, engine: Path, base: Checkpoint, delta: Delta) -> list[staging.Need]:
    """List what the patched engine, a build of it and the merged weights take at least."""
    both = 2 * engine.stat().st_size
    return [
        staging.Need(path=work / runtime.ENGINE, nbytes=both, what="the fine-tune's engine, twice"),
        merged_need(work / "merged", base, delta),
    ]


def _opened(model: Path) -> Checkpoint | QuantisedModel:
    return open_quantised(model) if is_quantised(model) else Checkpoint.open(model)


def _rest(device: DeviceFolder) -> Path | None:
    """Return what the engine of a quantised base does not hold, if there is any."""
    path = device.base / patch.REST
    return path if path.exists() else None


def _values(model: Checkpoint, beside: Path, room: ExitStack) -> Checkpoint:
    """Return a model's values: its own, or of a quantised one a copy that lives in this room."""
    if not is_quantised(model):
        return model
    copy = float_folder(open_quantised(model), beside=beside / "values")
    return Checkpoint.open(room.enter_context(copy))


def _require_patched(device: DeviceFolder, delta: Delta) -> PatchMap:
    """Return the map of a folder's engine, which has to be of the fine-tune's base."""
    bundle: Bundle = device.bundle
    if bundle.mode != "patch" or not runtime.is_engine(bundle):
        raise InputError(
            f"{device.root} has no engine that is patched: it is in {bundle.mode} mode, "
            f"for {bundle.runtime}",
            fix="leave --engine out for it, or give a folder of bundle --mode patch --engine",
        )
    places = read_map(device.base / patch.MAP)
    if places.outline is not None:
        places.outline.require(delta.manifest, str(device.root))
    elif bundle.base_root != delta.manifest.base.root:
        raise BaseMismatchError(
            f"{device.root} is of another base: {bundle.base_root}, not {delta.manifest.base.root}",
            fix="give the device folder that was bundled from this base",
        )
    return places


def _again(
    device: DeviceFolder, template: Template, merged: Path, work: Path, room: ExitStack
) -> Build:
    """Make a builder of the engine of a merged fine-tune, as this folder's, by the same TensorRT.

    Args:
        device: the folder.
        template: the architecture.
        merged: the fine-tune, a float model or a quantised one.
        work: a folder for a copy of its values.
        room: where that copy lives.
    """
    recipe = read_recipe(device.base)
    trt = choose(device.bundle.runtime, recipe.capabilities, (device.bundle.dtype,))
    if trt.__version__ != recipe.tensorrt:
        raise ExportError(
            f"the engine is of {trt.__name__} {recipe.tensorrt}, and this machine has "
            f"{trt.__version__}",
            fix=f"install {trt.__name__} {recipe.tensorrt}, or bundle again",
        )
    return engine_builder(
        trt,
        template,
        _values(Checkpoint.open(merged), work, room),
        capabilities=recipe.capabilities,
        quantised=open_quantised(merged) if is_quantised(merged) else None,
    )


def _template(device: DeviceFolder, loaded: LoadedModel) -> Template:
    inputs = golden.read(device.base / golden.FILE).inputs
    batch = {name: torch.from_numpy(array) for name, array in inputs.items()}
    sizes = read_recipe(device.base).sizes
    return export_template(loaded, batch, dtype=device.bundle.dtype, sizes=sizes)
