"""Write a model card for a `.kd` file: Markdown whose front matter the Hugging Face hub reads.

Source: https://huggingface.co/docs/hub/model-cards. Everything in it comes from the file, except
what no file can know: the base's name on the hub and its licence.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import Any

from kilodelta.errors import InputError
from kilodelta.sizes import byte_label

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?\Z")
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}\Z")
_MEASURES = (
    ("agreement", "agreement with the tuned model, on held-out inputs"),
    ("kl", "divergence (KL, nats)"),
    ("cosine", "cosine to the tuned model's embeddings"),
    ("held_out", "held-out inputs"),
    ("steps", "training steps"),
    ("weight_error", "distance of the weights to the tuned ones, relative to the change"),
)


def card(
    contents: Mapping[str, Any],
    *,
    base_model: str = "",
    licence: str = "",
    title: str = "",
) -> str:
    """Return a model card.

    Args:
        contents: what `kilodelta inspect --json` prints of the file.
        base_model: the base's id on the hub, such as `org/name`; the file names a base by its
            digest, which no hub can look up.
        licence: the licence identifier of the base, which a fine-tune of it inherits.
        title: the heading; the file's name by default.

    Raises:
        InputError: `base_model` or `licence` is none.

    Example:
        >>> import kilodelta
        >>> from kilodelta.report.card import card
        >>> contents = kilodelta.inspect("tests/golden/0.1.0/nola-8.kd").to_json()
        >>> card(contents, base_model="org/base", licence="apache-2.0").splitlines()[1]
        'library_name: kilodelta'
    """
    if base_model and not _HUB_ID.match(base_model):
        raise InputError(f"{base_model!r:.80} is no hub id", fix="write it as org/name")
    if licence and not _LICENCE.match(licence):
        raise InputError(f"{licence!r:.80} is no licence", fix="for example apache-2.0 or mit")
    name = os.path.basename(str(contents["path"]))
    method = contents["method"]
    options = ", ".join(f"{key} {value}" for key, value in method.items() if key != "name")
    base = contents["base"]
    shown = base_model or str(base["name"]) or "the base model"
    made = contents.get("made", {})
    rows = [
        ("base", f"{_text(shown)}, `{base['root']}`"),
        ("method", f"{method['name']} ({options}), {contents['bits']}-bit coefficients"),
        ("bytes", f"{contents['nbytes']['file']:,} ({byte_label(contents['nbytes']['file'])})"),
        ("tensors updated", str(contents["targets"]["count"])),
        ("tensors stored whole", ", ".join(f"`{_text(n)}`" for n in contents["extras"]) or "none"),
        *((words, _text(made[key])) for key, words in _MEASURES if key in made),
        ("result", f"`{contents['result']}`"),
    ]
    table = "\n".join(f"| {key} | {value} |" for key, value in rows)
    place = base_model or "base/"
    return f"""---
{_front_matter(base_model, licence, method["name"])}
---

# {_text(title or name)}

A fine-tune of {_text(shown)} as a `.kd` file: the base's digest, a seed and small integers.
Merged with exactly that base it gives the same bits on every machine, and the digest below
proves it.

| | |
|---|---|
{table}

## Use it

```sh
kilodelta merge {place} {name} -o merged/     # proved while it is written; AutoModel opens merged/
kilodelta verify {place} {name} merged/
```

On devices, as ONNX, TensorRT or PEFT: see the documentation of kilodelta.

## What it is not

It holds none of the base's weights and is of no use without them. The base's licence and
intended use apply.
"""


def _front_matter(base_model: str, licence: str, method: str) -> str:
    """YAML whose texts are written as JSON strings, which YAML reads alike."""
    lines = ["library_name: kilodelta", "tags:", "- kilodelta", f"- {json.dumps(method)}"]
    if base_model:
        lines += [f"base_model: {json.dumps(base_model)}", "base_model_relation: adapter"]
    if licence:
        lines.append(f"license: {json.dumps(licence)}")
    return "\n".join(lines)


def _text(value: Any) -> str:
    """Write a value of the file as Markdown: one line, nothing that Markdown or HTML acts on."""
    flat = "".join(c if c.isprintable() else " " for c in str(value))[:200]
    return re.sub(r"([\\`*_{}\[\]<>()#|!])", r"\\\1", flat)
