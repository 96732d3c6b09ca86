#!/usr/bin/env bash
# A function out of numba's cache imports scipy.linalg, and with it numpy.f2py, the generator of Fortran
# wrappers, when it is first called, where SciPy happens to be installed; be it x + 1 on a number, with no
# array and no linear algebra in it. One guesses that machine code that is cached needs numba's runtime, and
# that numba takes SciPy for np.linalg alone. numba 0.68.1, scipy 1.17.0. Met by whoever ships a command with
# cached kernels and counts its start: it is slower where an unrelated package was installed.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q numba==0.68.1 numpy==2.4.6
cd "$work"
cat > plus.py <<'PY'
import numba

@numba.njit(cache=True)
def one(x):
    return x + 1
PY
cat > start.py <<'PY'
import sys

import numba

import plus

before = {"numpy.f2py", "scipy.linalg"} & set(sys.modules)
assert not before  # the import of numba loads neither
assert plus.one(1) == 2
[hits] = plus.one.stats.cache_hits.values() or [0]
loaded = sorted({"numpy.f2py", "scipy.linalg"} & set(sys.modules))
print(f"numba {numba.__version__}: x + 1, cache hits {hits}, loaded {', '.join(loaded) or 'neither'}")
if len(sys.argv) > 1:  # a second process, which compiles nothing
    assert hits == 1
    assert ", ".join(loaded) == sys.argv[1]
PY
"$work/env/bin/python" start.py
"$work/env/bin/python" start.py ""
"$work/env/bin/pip" install -q scipy==1.17.0
"$work/env/bin/python" -c 'import scipy; print("scipy", scipy.__version__)'
"$work/env/bin/python" start.py "numpy.f2py, scipy.linalg"
