"""Use a delta: merge it, export it to ONNX and TensorRT, patch, refit, adapt, or hand it to PEFT.

One folder for each target; `pipeline.py` writes several at once with a manifest of their digests.
Names load when first used, because merging and patching need neither torch nor onnx.

================  ================================================================================
 whole exports    `export` (ONNX files, TensorRT engines, a manifest), `export_peft`
 a loaded model   `merge_into`; `kilodelta.merge` writes files
 adapter mode     `with_adapter` makes the graph; `read_layout`, `expand`, `base_factors`,
                  `in_slots` and `put_slot` feed it; `export_adapter` and `write_adapter` write
                  ONNX Runtime's own adapter files
 patch mode       `make_map`, `write_map` and `write_rest` once; `read_map`, `patch` and
                  `open_patched` for each fine-tune
 refit mode       `RefitEngine`, on a `CudaStream` of the CUDA `driver()`
 named graphs     `export_template`, `fill_template` and `save`, of what `open_model` opens, or
                  `open_headed` where fine-tunes bring a head that the base lacks
================  ================================================================================
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kilodelta.lazy import lazy

if TYPE_CHECKING:
    from kilodelta.export.adapter.factors import base_factors as base_factors
    from kilodelta.export.adapter.factors import expand as expand
    from kilodelta.export.adapter.factors import in_slots as in_slots
    from kilodelta.export.adapter.factors import put_slot as put_slot
    from kilodelta.export.adapter.file import write_adapter as write_adapter
    from kilodelta.export.adapter.folder import AdapterOptions as AdapterOptions
    from kilodelta.export.adapter.folder import export_adapter as export_adapter
    from kilodelta.export.adapter.graph import with_adapter as with_adapter
    from kilodelta.export.adapter.layout import AdapterLayout as AdapterLayout
    from kilodelta.export.adapter.layout import read_layout as read_layout
    from kilodelta.export.architecture import HeadedBase as HeadedBase
    from kilodelta.export.architecture import open_headed as open_headed
    from kilodelta.export.merge.in_place import merge_into as merge_into
    from kilodelta.export.onnx.make import export_template as export_template
    from kilodelta.export.onnx.save import save as save
    from kilodelta.export.onnx.template import Template as Template
    from kilodelta.export.onnx.template import fill_template as fill_template
    from kilodelta.export.options import Options as Options
    from kilodelta.export.patching.make_map import make_map as make_map
    from kilodelta.export.patching.make_map import write_rest as write_rest
    from kilodelta.export.patching.map import PatchMap as PatchMap
    from kilodelta.export.patching.map_file import read_map as read_map
    from kilodelta.export.patching.map_file import write_map as write_map
    from kilodelta.export.patching.rewrite import patch as patch
    from kilodelta.export.patching.session import open_patched as open_patched
    from kilodelta.export.peft.adapter import PeftOptions as PeftOptions
    from kilodelta.export.peft.adapter import export_peft as export_peft
    from kilodelta.export.pipeline import export as export
    from kilodelta.export.tensorrt.cuda import CudaStream as CudaStream
    from kilodelta.export.tensorrt.cuda import driver as driver
    from kilodelta.export.tensorrt.refit import RefitEngine as RefitEngine
    from kilodelta.models import open_model as open_model

_WHERE = {
    "AdapterLayout": "kilodelta.export.adapter.layout",
    "AdapterOptions": "kilodelta.export.adapter.folder",
    "HeadedBase": "kilodelta.export.architecture",
    "Options": "kilodelta.export.options",
    "PatchMap": "kilodelta.export.patching.map",
    "PeftOptions": "kilodelta.export.peft.adapter",
    "RefitEngine": "kilodelta.export.tensorrt.refit",
    "CudaStream": "kilodelta.export.tensorrt.cuda",
    "Template": "kilodelta.export.onnx.template",
    "base_factors": "kilodelta.export.adapter.factors",
    "driver": "kilodelta.export.tensorrt.cuda",
    "expand": "kilodelta.export.adapter.factors",
    "export": "kilodelta.export.pipeline",
    "export_adapter": "kilodelta.export.adapter.folder",
    "export_peft": "kilodelta.export.peft.adapter",
    "export_template": "kilodelta.export.onnx.make",
    "fill_template": "kilodelta.export.onnx.template",
    "in_slots": "kilodelta.export.adapter.factors",
    "make_map": "kilodelta.export.patching.make_map",
    "merge_into": "kilodelta.export.merge.in_place",
    "open_headed": "kilodelta.export.architecture",
    "open_model": "kilodelta.models",
    "open_patched": "kilodelta.export.patching.session",
    "patch": "kilodelta.export.patching.rewrite",
    "put_slot": "kilodelta.export.adapter.factors",
    "read_layout": "kilodelta.export.adapter.layout",
    "read_map": "kilodelta.export.patching.map_file",
    "save": "kilodelta.export.onnx.save",
    "with_adapter": "kilodelta.export.adapter.graph",
    "write_adapter": "kilodelta.export.adapter.file",
    "write_map": "kilodelta.export.patching.map_file",
    "write_rest": "kilodelta.export.patching.make_map",
}

__all__ = [
    "AdapterLayout",
    "AdapterOptions",
    "CudaStream",
    "HeadedBase",
    "Options",
    "PatchMap",
    "PeftOptions",
    "RefitEngine",
    "Template",
    "base_factors",
    "driver",
    "expand",
    "export",
    "export_adapter",
    "export_peft",
    "export_template",
    "fill_template",
    "in_slots",
    "make_map",
    "merge_into",
    "open_headed",
    "open_model",
    "open_patched",
    "patch",
    "put_slot",
    "read_layout",
    "read_map",
    "save",
    "with_adapter",
    "write_adapter",
    "write_map",
    "write_rest",
]

__getattr__, __dir__ = lazy(__name__, _WHERE)
