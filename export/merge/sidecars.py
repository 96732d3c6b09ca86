"""What lies beside the weights of a model folder: configuration, tokenizer, pooling."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from kilodelta.files.checkpoint import INDEX, Checkpoint
from kilodelta.format.delta import Delta

WEIGHTS = frozenset(
    {".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".tflite"}
    | {".safetensors", ".engine", ".plan"}
)
"""Files of these kinds beside the weights are the base's weights in another form."""
OTHER_FORMS = frozenset({"onnx", "openvino", "coreml", "tf", "flax"})
"""Folders that hold exports of the base."""


def copy_sidecars(checkpoint: Checkpoint, delta: Delta, stage: Path) -> tuple[str, ...]:
    """Copy everything but the base's weights; returns what was left out, by name.

    The base's weights in other forms (`pytorch_model.bin`, `onnx/`) would be the wrong model.
    """
    if not checkpoint.path.is_dir():
        return ()
    folder = checkpoint.shards[0].path.parent
    own = {shard.path.name for shard in checkpoint.shards} | {INDEX}
    left_out = []
    for place in sorted(folder.iterdir()):
        if place.name in own or place.name.startswith("."):
            continue
        if place.name in OTHER_FORMS or (place.is_file() and place.suffix in WEIGHTS):
            left_out.append(place.name)
        elif place.is_dir():
            shutil.copytree(place, stage / place.name)
        elif place.is_file():
            shutil.copyfile(place, stage / place.name)
    if checkpoint.index is not None:
        (stage / INDEX).write_bytes(_index(checkpoint, delta))
    return tuple(left_out)


def _index(checkpoint: Checkpoint, delta: Delta) -> bytes:
    """The base's index, with the tensors that the base lacks in the last shard."""
    added = [name for name in delta.extras if name not in checkpoint]
    changed = [
        name
        for name, tensor in delta.extras.items()
        if name in checkpoint and tensor.data.size != checkpoint.info(name).nbytes
    ]
    if checkpoint.index is None or not (added or changed):
        return checkpoint.index or b""
    index = json.loads(checkpoint.index)
    index["weight_map"] |= {name: checkpoint.shards[-1].path.name for name in added}
    sizes = [checkpoint.info(n).nbytes for n in checkpoint.names if n not in delta.extras]
    total = sum(sizes) + sum(tensor.data.size for tensor in delta.extras.values())
    index["metadata"] = {**(index.get("metadata") or {}), "total_size": total}
    return json.dumps(index, indent=2, sort_keys=True).encode("utf-8") + b"\n"
