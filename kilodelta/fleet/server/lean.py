"""Load numba without scipy's BLAS; importing this module, before all others, does it.

numba loads `scipy.linalg` for `numpy.dot` in compiled code, of which there is none here. That takes
a seventh of the server's start, and 120 of the 560 pieces of memory that every fork copies. It is
left out only where no child runs a module of the user's, which could compile such a product.
"""

import contextlib
import sys

SCIPY = "scipy"

if SCIPY not in sys.modules:
    sys.modules[SCIPY] = None  # type: ignore[assignment]  # Python then imports none
    try:
        with contextlib.suppress(ImportError):  # a child without numba says so itself
            __import__("numba.np.arraymath")
    finally:
        del sys.modules[SCIPY]
