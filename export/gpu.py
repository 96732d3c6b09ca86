"""The GPU of this machine, as far as building an engine for it needs it.

Asked through ctypes: `libcuda` comes with the driver, so no torch and no toolkit has to be there.
The numbers are those of NVIDIA's `cuda.h`.
"""

from __future__ import annotations

import ctypes
import sys

_LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # CUdevice_attribute


def present() -> str | None:
    """The compute capability of the first GPU, such as `sm89`; None without a GPU or driver."""
    try:
        cuda = ctypes.CDLL(_LIBRARY)
    except OSError:
        return None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    codes = (
        cuda.cuInit(0)
        or cuda.cuDeviceGet(ctypes.byref(device), 0)
        or cuda.cuDeviceGetAttribute(ctypes.byref(major), _CAPABILITY_MAJOR, device)
        or cuda.cuDeviceGetAttribute(ctypes.byref(minor), _CAPABILITY_MINOR, device)
    )
    return None if codes else f"sm{major.value}{minor.value}"
