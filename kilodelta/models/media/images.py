"""Read one image as transformers' processors take it: 8 bits, RGB, upright."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from kilodelta.errors import InputError, require
from kilodelta.files import plain

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
"""What Pillow may take a file for, whatever its name. Given EPS, it would start Ghostscript."""
_DEEP = ("I", "F")
"""How the modes of images begin whose values have no agreed range: 16 and 32 bits, and floats."""


def read_image(path: Path, place: str) -> Any:
    """Read an image as a `PIL.Image.Image` in mode RGB, turned as its EXIF tag says.

    Grey images, palettes and CMYK are converted, and an alpha channel is dropped, as the
    processors of transformers do.

    Args:
        path: the file.
        place: what it is called in messages.

    Raises:
        InputError: it is no image that Pillow reads, or has more than 8 bits a channel.
        MissingPackageError: Pillow is not installed.
    """
    pillow = require("PIL.Image", extra="media", why="read images")
    from PIL import ImageOps

    try:
        with plain.open_reader(path) as file, warnings.catch_warnings():
            warnings.simplefilter("error", pillow.DecompressionBombWarning)
            image = pillow.open(file, formats=FORMATS)
            image.load()
            upright = ImageOps.exif_transpose(image)
    except Exception as error:  # Pillow's plug-ins raise whatever their formats make them raise
        # Of a file of another kind Pillow says the open file, as Python prints it.
        is_other = isinstance(error, pillow.UnidentifiedImageError)
        why = f"its bytes are of none of {', '.join(FORMATS)}" if is_other else error
        raise InputError(
            f"{place}: {path.name} is no image that Pillow reads: {why}",
            fix="save it again as PNG or JPEG, or remove it",
        ) from None
    if image.mode.startswith(_DEEP):
        raise InputError(
            f"{place}: {path.name} is an image of mode {image.mode}, whose values have no fixed "
            "range",
            fix="convert it to 8 bits a channel, or give pixel_values in a .npz file",
        )
    return upright.convert("RGB")
