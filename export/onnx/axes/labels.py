"""Name the axes of an input by what it holds: text, sound, images, videos."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor

from kilodelta.export.manifest.facts import SEQUENCE
from kilodelta.export.onnx.axes.variation import Place
from kilodelta.models import Batch

SIDES = ("height", "width")


def axis_name(batch: Batch, places: Sequence[Place], taken: Collection[str]) -> str:
    """Name axes that vary together, by the first of them; no name is given twice.

    Args:
        batch: inputs by name.
        places: the axes, those of the main input first.
        taken: names that other axes have.
    """
    first, axis = places[0]
    label = image_axis(batch[first], axis)
    tensors = [batch[name] for name, _ in places]
    if label is None:
        if any(t.is_floating_point() for t in tensors):
            label = "time"
        else:
            label = f"decoder_{SEQUENCE}" if first.startswith("decoder_") else SEQUENCE
            label = label if label not in taken else f"{first}_{SEQUENCE}"
    return label if label not in taken else f"{first}_{axis}"


def family(name: str) -> str | None:
    """Name the text that an input describes token by token, by the names of tokenizers."""
    stem = name.removeprefix("decoder_")
    if stem in ("input_ids", "attention_mask", "token_type_ids", "position_ids"):
        return "decoder" if stem != name else "text"
    return None


def image_labels(tensor: Tensor) -> tuple[str, ...]:
    """Name the axes of images (batch, channels, height, width) and of videos with one more."""
    if not tensor.is_floating_point() or tensor.ndim not in (4, 5):
        return ()
    if tensor.ndim == 4:
        return ("", "", *SIDES)
    channels_first = tensor.shape[1] in (1, 3) and tensor.shape[2] not in (1, 3)
    return ("", "", "frames", *SIDES) if channels_first else ("", "frames", "", *SIDES)


def image_axis(tensor: Tensor, axis: int) -> str | None:
    """Name an image's axis, empty for its channels; None for an axis of no image."""
    labels = image_labels(tensor)
    return labels[axis] if labels else None
