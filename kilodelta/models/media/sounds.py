"""Read one sound: mono, at the rate that a model was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kilodelta.errors import InputError, require
from kilodelta.files import plain

SAMPLES = 1 << 25
"""Samples of one sound, all channels together, as it is stored and at the wanted rate: half an hour
at 16 kHz. A file of silence is a thousandth of what it is decoded to."""
LOWEST_RATE = 1000
"""Samples a second below which a file says nothing that a model hears, and would be lengthened to
many times its size."""


def read_sound(path: Path, rate: int, place: str) -> NDArray[np.float32]:
    """Read a sound as float32 samples in [-1, 1], channels averaged.

    Args:
        path: a file that libsndfile reads.
        rate: samples a second that are wanted.
        place: what it is called in messages.

    Raises:
        InputError: it is no sound, an empty one, one of more than `SAMPLES` or below
            `LOWEST_RATE`, or holds what is no number.
        MissingPackageError: soundfile is not installed.
    """
    soundfile = require("soundfile", extra="media", why="read sounds")
    try:
        with plain.open_reader(path) as file, soundfile.SoundFile(file) as sound:
            own = int(sound.samplerate)
            if own < LOWEST_RATE:
                raise InputError(
                    f"{place}: {path.name} is sampled at {own} Hz, and {LOWEST_RATE} at least are "
                    "read",
                    fix="correct the rate in its header, or record it again",
                )
            _require_short(sound.frames * max(sound.channels, rate / own), path, place)
            samples = sound.read(dtype="float32", always_2d=True)
    except InputError:
        raise
    except Exception as error:  # soundfile's errors share no base with what reading may raise
        raise InputError(
            f"{place}: {path.name} is no sound that can be read: "
            f"{getattr(error, 'error_string', error)}",  # without the file as Python prints it
            fix="save it again as WAV or FLAC, or remove it",
        ) from None
    if not len(samples):
        raise InputError(f"{place}: {path.name} holds no sound", fix="remove it")
    if not np.isfinite(samples).all():
        raise InputError(f"{place}: {path.name} holds NaN or infinity", fix="record it again")
    return resample(samples.mean(axis=1), own, rate)


def _require_short(samples: float, path: Path, place: str) -> None:
    if samples > SAMPLES:
        raise InputError(
            f"{place}: {path.name} has {samples:.0f} samples at the model's rate or in all of its "
            f"channels, and at most {SAMPLES} are read",
            fix="cut it into pieces",
        )


def resample(samples: NDArray[np.float32], own: int, wanted: int) -> NDArray[np.float32]:
    """Bring samples to another rate, by cutting or lengthening their spectrum.

    Args:
        samples: float32 `(n,)`.
        own: their rate.
        wanted: the rate to return.

    Returns:
        float32 `(round(n * wanted / own),)`; nothing above half of the lower rate is left.

    Example:
        >>> tone = np.sin(2 * np.pi * 5 * np.arange(100) / 100, dtype=np.float32)
        >>> bool(np.abs(resample(tone, 100, 200)[::2] - tone).max() < 1e-6)
        True
    """
    if own == wanted:
        return samples
    count = max(1, round(len(samples) * wanted / own))
    spectrum: Any = np.fft.rfft(samples.astype(np.float64))
    kept = np.zeros(count // 2 + 1, np.complex128)
    shared = min(len(kept), len(spectrum))
    kept[:shared] = spectrum[:shared]
    shorter = min(count, len(samples))
    if shorter % 2 == 0:  # the bin in the middle stands for both signs of its frequency
        kept[shorter // 2] *= 0.5 if count > len(samples) else 2.0
    return (np.fft.irfft(kept, count) * (count / len(samples))).astype(np.float32)
