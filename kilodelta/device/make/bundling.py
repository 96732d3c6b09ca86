"""Make a device folder: export the base, prepare it for one mode, and compute its golden values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from kilodelta.device.folder.bundle import Bundle
from kilodelta.device.folder.device_folder import DeviceFolder
from kilodelta.device.golden import golden, reference
from kilodelta.device.make import engines
from kilodelta.device.make.build import refuse_refit
from kilodelta.device.make.settings import Settings
from kilodelta.device.modes import patch, refit, runtime
from kilodelta.export.adapter.graph import with_adapter
from kilodelta.export.architecture import open_headed
from kilodelta.export.onnx.make import export_template
from kilodelta.export.onnx.save import save
from kilodelta.export.onnx.template import Template, fill_template
from kilodelta.export.patching.make_map import make_map, write_rest
from kilodelta.export.patching.map_file import write_map
from kilodelta.export.quantised import prove_codes, put_codes
from kilodelta.export.quantised.checks import refuse_blocks, require_folder, require_grids
from kilodelta.export.quantised.graph import settled
from kilodelta.export.room import needs_of_bundle
from kilodelta.export.tensorrt import build
from kilodelta.export.tensorrt.flavour import choose
from kilodelta.files import staging
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.files.model_digest import digest
from kilodelta.files.safetensors import write_stream
from kilodelta.format.targets import Patterns, select
from kilodelta.grid.dequantise import float_folder
from kilodelta.grid.model import QuantisedModel
from kilodelta.grid.open import is_quantised, open_quantised
from kilodelta.merging.outline import outline_of
from kilodelta.models import LoadedModel, locate
from kilodelta.models.layers import layer_weights, stacked_weights
from kilodelta.progress import Event, Progress


class BundleJob:
    """One bundle in the making.

    Args:
        base: a folder, a `.safetensors` file or `hf:org/name`.
        settings: what to deploy.
        progress: called after each step.
        room: a path beside which the values of a quantised base lie while this works.

    Raises:
        CheckpointError, InputError: the base cannot be opened.
        ExportError: no engine can be built for these GPUs, or the graph cannot hold a grid.
        MissingPackageError: TensorRT or transformers is needed.
    """

    def __init__(
        self, base: str, settings: Settings, progress: Progress, room: Path | None = None
    ) -> None:
        self.settings, self.progress = settings, progress
        self.trt: Any = None
        if settings.capabilities:
            self.trt = choose(settings.flavour, settings.capabilities, (settings.dtype,))
        folder = locate(base)
        self._room = ExitStack()
        self.quantised = open_quantised(folder) if is_quantised(folder) else None
        if self.quantised is not None:
            _check_quantised(self.quantised, settings)
        else:
            refuse_blocks(settings.blocks, folder)
        self.base = self.values = Checkpoint.open(folder)
        if room is not None:
            held = self.quantised or self.base
            staging.require_room(*needs_of_bundle(held, room, settings.dtype))
        if self.quantised is not None:
            copy = float_folder(self.quantised, beside=room)
            self.values = Checkpoint.open(self._room.enter_context(copy))
        headed = open_headed(self.values, config=settings.config, model=settings.model)
        if self.quantised is not None:  # messages name the base, not the copy of its values
            named = replace(headed.loaded, source=str(self.base.folder))
            headed = replace(headed, loaded=named)
        self.headed = headed
        self.loaded: LoadedModel = self.headed.loaded.choosing(settings.outputs)

    def __enter__(self) -> BundleJob:
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the copy of a quantised base's values."""
        self._room.close()

    def run(self, root: Path) -> Bundle:
        """Fill an empty folder, and return the bundle that it holds.

        Raises:
            InputError: the golden inputs do not fit the model.
            ExportError: the model cannot be exported, or no engine be built.
            OutputError: the folder cannot be written.
        """
        settings = self.settings
        base = root / "base"
        base.mkdir()
        batch = reference.golden_inputs(self.loaded, settings.probe, reference.ROWS)
        self._tell("golden", 1)
        exact = reference.exact(self.loaded, batch)
        limits = reference.limits(self.loaded, exact, settings.dtype)
        self._tell("export", 2)
        template = export_template(self.loaded, batch, dtype=settings.dtype, sizes=settings.sizes)
        MAKERS[settings.mode](self, template, base)
        self._tell("sealed", 3)
        golden.write(base / golden.FILE, exact)
        identity = digest(self.base)
        bundle = Bundle(
            mode=settings.mode,
            dtype=settings.dtype,
            runtime=self.trt.__name__ if self.trt else f"onnxruntime-{settings.provider}",
            base_name=settings.name,
            base_root=identity.root,
            files=(),
            limits=limits,
            ceiling=settings.ceiling,
            max_jump=settings.max_jump,
            keep=settings.keep,
            max_work=settings.max_work,
        )
        infos = {name: self.base.info(name) for name in self.base.names}
        outline = None
        if self.quantised is not None:
            outline = outline_of(self.quantised, self.quantised.identity())
        folder = DeviceFolder.create(root, bundle, infos=infos, identity=identity, outline=outline)
        return folder.bundle

    def save(self, template: Template, folder: Path) -> Path:
        """Write the filled template as a folder's ONNX file, with the codes of a quantised base."""
        model, path = fill_template(template, self.headed.weights), folder / runtime.ONNX
        if self.quantised is None:
            return save(model, path)[0]
        held = put_codes(
            model,
            self.quantised,
            form=settled(self.settings.blocks, for_engines=self.trt is not None),
            dtype=template.dtype,
            leave=self.headed.heads,
        )
        save(model, path)
        prove_codes(path, self.quantised, held)
        return path

    def engine(self, template: Template, folder: Path, refittable: tuple[str, ...] = ()) -> None:
        """Build a folder's engine from its ONNX file, which then goes unless it is wanted."""
        onnx = folder / runtime.ONNX
        build.build(
            self.trt,
            onnx,
            folder / runtime.ENGINE,
            capabilities=self.settings.capabilities,
            profile=template.profile(),
            refit=refittable,
            progress=self.progress,
        )
        if not self.settings.keep_onnx:
            for path in folder.glob(f"{runtime.ONNX}*"):
                path.unlink()

    def chosen(self) -> tuple[str, ...]:
        """Return the names of the base's tensors that fine-tunes may change."""
        include, exclude = self.settings.include or ("*",), self.settings.exclude
        infos = (self.base.info(name) for name in self.base.names)
        patterns = Patterns(include=include, exclude=exclude)
        return tuple(target.name for target in select(infos, patterns))

    def _tell(self, what: str, done: int) -> None:
        self.progress(Event(stage=f"bundle: {what}", done=done, total=3, unit="steps"))


def _check_quantised(base: QuantisedModel, settings: Settings) -> None:
    """Refuse, before anything is made, what a device folder cannot do with a quantised base."""
    require_folder(base, "a device folder")
    refuse_refit(settings.mode, base.path)
    require_grids(base, (settings.dtype,), settings.capabilities)


def _adapter(job: BundleJob, template: Template, base: Path) -> None:
    settings = job.settings
    wide, layout = with_adapter(
        template,
        job.values,
        include=settings.include,
        exclude=settings.exclude,
        layers=layer_weights(job.loaded.module, job.loaded.names),
        stacks=stacked_weights(job.loaded.module, job.loaded.names),
        heads=job.headed.heads,
        whole=settings.whole,
        name=settings.name,
        rank=settings.rank,
        slots=settings.slots,
        any_labels=job.trt is None,
        quantised=job.quantised,
    )
    job.save(wide, base)
    layout.write(base)
    if job.trt:
        job.engine(wide, base)


def _patch(job: BundleJob, template: Template, base: Path) -> None:
    heads = job.headed.heads
    if job.trt:
        places = engines.map_engine(job, template, base)
        if job.settings.keep_onnx:
            job.save(template, base)
    else:
        model = job.save(template, base)
        places = make_map(model, job.quantised or job.base, heads=heads, unused=template.unused)
    write_map(places, base / patch.MAP)
    write_rest(places, job.quantised or job.base, base / patch.REST)


def _refit(job: BundleJob, template: Template, base: Path) -> None:
    chosen = job.chosen()
    job.save(template, base)
    job.engine(template, base, tuple(name for name in chosen if name in template.weights))
    data = (job.base.data(name).data for name in chosen)
    write_stream(base / refit.WEIGHTS, [job.base.info(name) for name in chosen], data)
    refit.write_unused(base, template.unused)


MAKERS: Mapping[str, Callable[[BundleJob, Template, Path], None]] = MappingProxyType(
    {"adapter": _adapter, "patch": _patch, "refit": _refit}
)
