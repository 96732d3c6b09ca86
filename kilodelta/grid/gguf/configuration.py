"""Write what a GGUF file's metadata say of its model as the files that Hugging Face's tools read.

transformers reads configuration and tokenizer; the rest is what it leaves out.
"""

from __future__ import annotations

import json
from pathlib import Path

from kilodelta.errors import CheckpointError, require
from kilodelta.grid.gguf.file import GgufSource


def describe(source: GgufSource, place: Path) -> None:
    """Write `config.json`, and the tokenizer's files if the file holds a tokenizer.

    Args:
        source: the GGUF file.
        place: an existing folder.

    Raises:
        CheckpointError: transformers cannot read them.
        MissingPackageError: transformers is not installed.
    """
    path, values = source.file.path, source.values
    auto = require("transformers", extra="hf", why=f"read the configuration of {path}")
    causal = require("transformers.models.auto.modeling_auto", extra="hf", why=f"read {path}")
    given = {"gguf_file": path.name}
    folder = path.absolute().parent
    try:
        config = auto.AutoConfig.from_pretrained(folder, **given)
        if "tokenizer.ggml.model" in values:
            auto.AutoTokenizer.from_pretrained(folder, **given).save_pretrained(place)
    except (ValueError, KeyError, OSError, NotImplementedError) as problem:
        raise CheckpointError(
            f"transformers cannot read the configuration of {path}: {problem!s:.200}",
            fix="distil against the float model, and make its file fit by kilodelta rebase",
        ) from None
    table = config.to_dict()
    table["architectures"] = [causal.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    width = values.get(f"{values.get('general.architecture')}.attention.key_length")
    if isinstance(width, int):  # transformers 5.23 takes a default in its place
        table["head_dim"] = width
    (place / "config.json").write_text(json.dumps(table, indent=1, default=str))
