"""Gather the commands that turn a `.kd` file into what other tools load."""

from kilodelta.commands.export.adapter import export_adapter as export_adapter
from kilodelta.commands.export.edge_llm import export_edge_llm as export_edge_llm
from kilodelta.commands.export.gguf import export_gguf as export_gguf
from kilodelta.commands.export.merged import export as export
from kilodelta.commands.export.merged import merge as merge
from kilodelta.commands.export.peft import export_peft as export_peft

__all__ = [
    "export",
    "export_adapter",
    "export_edge_llm",
    "export_gguf",
    "export_peft",
    "merge",
]
