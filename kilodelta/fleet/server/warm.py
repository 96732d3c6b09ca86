"""Load and prove the kernels once, in the process that children are forked from.

Importing this module, after the libraries, is its effect: a fork inherits compiled kernels and the
result of their self-test, which each child would else pay for again, and need not look for what
killed processes left in the folder of temporary files. It starts no thread, so forking stays safe.
"""

from __future__ import annotations

import contextlib
import gc

from kilodelta.errors import SelfTestError
from kilodelta.exact.selftest import require_good_kernels
from kilodelta.files import staging
from kilodelta.format.methods import METHODS

for method in METHODS:
    _ = METHODS[method]  # loads it

# A child meets the same failure and reports it as its own task's; the server must live.
with contextlib.suppress(SelfTestError):
    require_good_kernels()

staging.sweep_temporary()

# A collection in a child would write to the pages of all that was loaded, and so copy them.
gc.freeze()
