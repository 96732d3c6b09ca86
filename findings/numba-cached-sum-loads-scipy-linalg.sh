#!/usr/bin/env bash
# A function out of numba's cache that adds up an array with .sum() imports scipy.linalg when it is
# loaded, and with it numpy.f2py, the generator of Fortran wrappers: the cached code names numba's
# module of reductions, which looks for a BLAS as it is imported. The same sum as a loop loads
# neither. One guesses that cached machine code needs numba's runtime and nothing more. numba 0.68.1,
# scipy 1.17.0. Met by whoever ships command-line tools with cached kernels and counts their start.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q numba==0.68.1 numpy==2.4.6 scipy==1.17.0
cd "$work"
cat > added.py <<'PY'
import numba

@numba.njit(cache=True)
def by_method(values):
    return values.sum()

@numba.njit(cache=True)
def by_loop(values):
    total = 0.0
    for value in values:
        total += value
    return total
PY
cat > start.py <<'PY'
import sys

import numba
import numpy as np

import added

name = sys.argv[1]
function = getattr(added, name)
assert function(np.arange(8.0)) == 28.0
[hits] = function.stats.cache_hits.values() or [0]
loaded = sorted({"numba.np.arraymath", "numpy.f2py", "scipy.linalg"} & set(sys.modules))
print(f"numba {numba.__version__}, {name}: cache hits {hits}, loaded {', '.join(loaded) or 'none of the three'}")
if len(sys.argv) > 2:  # a second process, which compiles nothing
    assert hits == 1
    assert loaded == (["numba.np.arraymath", "numpy.f2py", "scipy.linalg"] if name == "by_method" else [])
PY
for name in by_method by_loop; do
  "$work/env/bin/python" start.py $name
  "$work/env/bin/python" start.py $name cached
done
