"""One entry per layout: its stored tensors, how codes are unpacked and rewritten, exact values."""

from __future__ import annotations

from kilodelta.grid.layouts.base import Layout as Layout
from kilodelta.grid.layouts.base import Parts as Parts
from kilodelta.grid.layouts.compressed_tensors import Nvfp4Packed as Nvfp4Packed
from kilodelta.grid.layouts.compressed_tensors import PackQuantized as PackQuantized
from kilodelta.grid.layouts.fp8 import Fp8 as Fp8
from kilodelta.grid.layouts.gguf_blocks import GgufBlocks as GgufBlocks
from kilodelta.grid.layouts.gptq import Awq as Awq
from kilodelta.grid.layouts.gptq import Gptq as Gptq
from kilodelta.grid.layouts.modelopt import ModelOptInt4 as ModelOptInt4
from kilodelta.grid.layouts.modelopt import ModelOptNvfp4 as ModelOptNvfp4
from kilodelta.grid.layouts.onnx_blocks import DequantizeLinear as DequantizeLinear
from kilodelta.grid.layouts.onnx_blocks import MatMulNBits as MatMulNBits

LAYOUTS: tuple[type[Layout], ...] = (
    PackQuantized, Nvfp4Packed, ModelOptNvfp4, ModelOptInt4, Fp8, Gptq, Awq, GgufBlocks,
    MatMulNBits, DequantizeLinear,
)  # fmt: skip

__all__ = [
    "LAYOUTS", "Awq", "DequantizeLinear", "Fp8", "GgufBlocks", "Gptq", "Layout", "MatMulNBits",
    "ModelOptInt4", "ModelOptNvfp4", "Nvfp4Packed", "PackQuantized", "Parts",
]  # fmt: skip
