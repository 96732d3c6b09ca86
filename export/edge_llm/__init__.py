"""Write a low-rank delta as the LoRA side-car that TensorRT Edge-LLM's runtime loads: a folder."""

from kilodelta.export.edge_llm.sidecar import EdgeLlmAdapter as EdgeLlmAdapter
from kilodelta.export.edge_llm.sidecar import export_edge_llm as export_edge_llm

__all__ = ["EdgeLlmAdapter", "export_edge_llm"]
