"""Write a low-rank delta as a LoRA adapter that llama.cpp loads: one GGUF file."""

from kilodelta.export.gguf.adapter import GgufAdapter as GgufAdapter
from kilodelta.export.gguf.adapter import export_gguf as export_gguf

__all__ = ["GgufAdapter", "export_gguf"]
