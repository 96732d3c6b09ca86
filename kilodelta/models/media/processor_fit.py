"""See that a processor is the model's, as far as their files tell.

transformers opens some processor whatever a folder's file holds. Where the file names no class, it
takes the one of the model's type, ignores keys which that lacks, and fills in defaults: a Whisper
with an image processor's file hears by Whisper's defaults, and nothing says so.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from kilodelta.errors import InputError
from kilodelta.files import plain
from kilodelta.models.loaded import Batch, LoadedModel

_FILE, _WHOLE = "preprocessor_config.json", "processor_config.json"
_TYPES = {"sounds": "feature_extractor_type", "images": "image_processor_type"}
_PARTS = {"sounds": "feature_extractor", "images": "image_processor"}
"""Where a processor of several parts keeps this one's settings."""
_TELLING = {"sounds": ("sampling_rate",), "images": ("size", "image_mean")}
"""What old files, which name no class, state nevertheless."""
_SPECTRA = ("input_features", "input_values")
_BINS = ("num_mel_bins", "input_feat_per_channel")
_FIX = (
    "save the processor that the model was trained with into its folder "
    "(processor.save_pretrained), or give arrays in a .npz file"
)


def check_stated(folder: Path, processor: Any, kind: str) -> None:
    """See that a folder's file is one of such a processor, and not made up by defaults.

    Args:
        folder: a model's.
        processor: what transformers opened from it.
        kind: `sounds` or `images`.

    Raises:
        InputError: the file names no class, and lacks what every such processor states.
    """
    table = _settings(folder, kind)
    if table is None or _TYPES[kind] in table or any(key in table for key in _TELLING[kind]):
        return
    stated = ", ".join(sorted(map(str, table))[:6]) or "nothing"
    raise InputError(
        f"the processor's file in {folder} states {stated:.200}, and neither "
        f"{_TYPES[kind]} nor {' or '.join(_TELLING[kind])}: transformers would take "
        f"{type(processor).__name__} with its defaults for {kind}",
        fix=_FIX,
    )


def check_made(row: Batch, processor: Any, loaded: LoadedModel) -> None:
    """Hold what a processor makes of the first record against the model's configuration.

    Args:
        row: tensors by name, as the processor makes them.
        processor: its own settings are named where they differ.
        loaded: the model.

    Raises:
        InputError: the model takes none of it, or other mel bins, frames, channels or another
            sampling rate; names both values.
    """
    name, where = type(processor).__name__, loaded.source
    if not any(key in loaded.accepts for key in row):
        raise InputError(
            f"the processor of {where}, {name}, makes {', '.join(row)}, and "
            f"{type(loaded.module).__name__} takes {', '.join(loaded.accepts)}",
            fix=_FIX,
        )
    for what, made, wanted in _differences(row, processor, loaded):
        raise InputError(
            f"the processor of {where}, {name}, makes {made} {what}, and the model takes {wanted}",
            fix=_FIX,
        )


def stated_side(loaded: LoadedModel) -> tuple[int, int] | None:
    """Return the height and width that a model's configuration states for images, or None."""
    size = _stated(loaded, ("image_size",), (int, list, tuple, dict))
    if isinstance(size, dict):
        size = (size.get("height"), size.get("width"))
    height, width = (size, size) if isinstance(size, int) or size is None else (*size, None)[:2]
    return (height, width) if isinstance(height, int) and isinstance(width, int) else None


def _differences(
    row: Batch, processor: Any, loaded: LoadedModel
) -> Iterator[tuple[str, object, object]]:
    """Yield what differs: its name, what the processor makes, what the model takes."""
    bins = _stated(loaded, _BINS)
    for name in _SPECTRA:
        shape = tuple(row[name].shape[1:]) if name in row else ()
        if len(shape) == 2 and bins not in (None, *shape):
            yield f"mel bins ({name} {shape})", getattr(processor, "feature_size", shape[0]), bins
    frames = getattr(processor, "nb_max_frames", None)
    places = _stated(loaded, ("max_source_positions",))
    if isinstance(frames, int) and places is not None and frames != 2 * places:
        yield "frames a sound (nb_max_frames)", frames, f"{2 * places} (2 * max_source_positions)"
    rate, wanted = getattr(processor, "sampling_rate", None), _stated(loaded, ("sampling_rate",))
    if isinstance(rate, int) and wanted not in (None, rate):
        yield "samples a second (sampling_rate)", rate, wanted
    channels = _stated(loaded, ("num_channels",))
    pixels = row.get("pixel_values")
    if pixels is not None and pixels.dim() == 4 and channels not in (None, pixels.shape[1]):
        yield "channels of an image", pixels.shape[1], f"{channels} (num_channels)"


def _stated(
    loaded: LoadedModel, keys: Collection[str], kinds: type | tuple[type, ...] = int
) -> Any:
    """Return the first of some keys that the configuration, or a part of it, states."""
    config = getattr(loaded.module, "config", None)
    parts = ("", "vision_config", "audio_config", "encoder")
    owners = [getattr(config, part, None) if part else config for part in parts]
    values = (getattr(owner, key, None) for owner in owners for key in keys)
    return next((v for v in values if isinstance(v, kinds) and not isinstance(v, bool)), None)


def _settings(folder: Path, kind: str) -> dict[str, Any] | None:
    """Return the settings that transformers reads; None where there are none to be read."""
    for name, part in ((_WHOLE, _PARTS[kind]), (_FILE, "")):
        try:
            table = json.loads(plain.read_model_file(folder / name))
        except (OSError, ValueError, RecursionError):
            continue
        table = table.get(part) if part and isinstance(table, dict) else table
        if isinstance(table, dict):
            return table
    return None
