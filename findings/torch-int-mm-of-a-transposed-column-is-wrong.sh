#!/usr/bin/env bash
# torch._int_mm on a CPU, the int8 product under torchao's dynamic quantisation, multiplies a row that is
# a transposed column (1, k), strides (1, 1), wrongly, without an error: oneDNN refuses a leading dimension
# below k, and nobody reads its answer. torch calls such a row contiguous, and `contiguous()` returns it as
# it is. One guesses: integer products are exact, whatever the strides. torch 2.13.0 (pytorch PR 194682, open,
# is about it). Met by whoever multiplies codes of one token, or of a layer with one output.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q torch==2.13.0 numpy
cat >"$work/try.py" <<'PY'
import torch

print("torch", torch.__version__, "oneDNN", torch.backends.mkldnn.is_available())
generator = torch.Generator().manual_seed(0)
column = torch.randint(-127, 128, (64, 1), dtype=torch.int8, generator=generator)
weight = torch.randint(-127, 128, (64, 32), dtype=torch.int8, generator=generator)
exact = column.t().int() @ weight.int()
for name, row in (("transposed", column.t()), ("contiguous()", column.t().contiguous()), ("clone", torch.empty(1, 64, dtype=torch.int8).copy_(column.t()))):
    right = torch.equal(torch._int_mm(row, weight), exact)
    print(f"{name:12} strides {row.stride()}, is_contiguous {row.is_contiguous()}: {'exact' if right else 'wrong'}")
    assert row.is_contiguous()
    assert right is (name == "clone"), "single rows are multiplied otherwise now"
PY
"$work/env/bin/python" "$work/try.py"
