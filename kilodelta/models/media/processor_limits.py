"""Refuse a processor's configuration that asks for more than any model was trained with.

The sizes in it cost a stranger no bytes: an image of 20,000 pixels a side or a sound padded to
hours takes minutes and gigabytes before the model says that it does not fit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kilodelta.errors import InputError
from kilodelta.files import plain, untrusted

FILES = ("preprocessor_config.json", "processor_config.json")
"""What transformers reads a processor from; the second may hold several processors."""
SIDE = 4096
"""Pixels that an image may be resized, cropped or padded to, along one side."""
LIMITS: Mapping[str, int] = {
    **dict.fromkeys(("size", "crop_size", "pad_size", "height", "width"), SIDE),
    **dict.fromkeys(("max_height", "max_width", "shortest_edge"), SIDE),
    "sampling_rate": 192_000,
    "chunk_length": 600,
    "n_fft": 1 << 16,
    "feature_size": 4096,
    "num_mel_bins": 4096,
    "max_length": 1 << 16,
    "max_patches": 1 << 16,
    "image_seq_length": 1 << 16,
    "num_additional_image_tokens": 1 << 16,
    "model_max_length": 10**31,  # transformers writes 1e30 where a tokenizer has no limit
}
"""The largest value of a key, wherever in the file it stands: pixels, seconds, samples, counts."""
OTHERS = 1 << 26
"""The largest number under any other key. Some processors give pixels of an area this way."""
SPECTRUM = 1 << 24
"""Values of the spectrum that a sound extractor computes of a whole chunk; Whisper's has 1.2 M."""


def check_processor_limits(folder: Path) -> None:
    """Check the sizes in a folder's processor configurations.

    Args:
        folder: a model's; a file that it lacks, or that is no JSON, is transformers' to refuse.

    Raises:
        InputError: a number is infinite, NaN, or above its limit.
    """
    for name in FILES:
        try:
            table = json.loads(plain.read_model_file(folder / name))
        except (OSError, ValueError, RecursionError):
            continue
        for key, value in _numbers(table):
            limit = LIMITS.get(key, OTHERS)
            if not math.isfinite(value) or value > limit:
                raise _too_much(folder, f"{key:.100} is {value:.15g}", f"at most {limit}")
        for part in untrusted.objects(table):
            values = _spectrum(part)
            if values > SPECTRUM:
                formula = "chunk_length * sampling_rate / hop_length * n_fft"
                raise _too_much(folder, f"{formula} is {values:.15g}", f"at most {SPECTRUM}")


def _too_much(folder: Path, what: str, wanted: str) -> InputError:
    return InputError(
        f"the processor of {folder} asks for too much: {what}, {wanted} is taken",
        fix="save the processor that the model was trained with into its folder",
    )


def _numbers(value: Any) -> Iterator[tuple[str, float]]:
    """Yield every number in a JSON value, with the key that it or its list stands under."""
    for table in untrusted.objects(value):
        for key, part in table.items():
            for number in part if isinstance(part, list) else [part]:
                if isinstance(number, (int, float)) and not isinstance(number, bool):
                    yield key, number if abs(number) < 2**1000 else math.inf


def _spectrum(table: Mapping[str, Any]) -> float:
    """Count the values of a chunk's spectrum; 0 where the configuration is not of such a kind."""
    names = ("chunk_length", "sampling_rate", "n_fft", "hop_length")
    values = [table.get(name) for name in names]
    if not all(isinstance(value, (int, float)) and value > 0 for value in values):
        return 0
    seconds, rate, window, hop = map(float, values)  # type: ignore[arg-type]
    return seconds * rate / hop * window
