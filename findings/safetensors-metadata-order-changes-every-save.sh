#!/usr/bin/env bash
# Saving the same tensors with the same metadata gives other bytes at every call: safetensors keeps
# `metadata` in a hash map of its own and writes the header in that map's order, which is drawn anew
# for each call, also within one process; PYTHONHASHSEED has no say, as the map lies in Rust. With two
# keys both orders occur, with six nearly every file is new. Tensors are sorted, so one guesses that
# the header is. Met by whoever hashes, signs, caches or deduplicates files: hash tensors instead, or
# write one key. safetensors 0.8.0.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q safetensors==0.8.0 numpy==2.4.6
PYTHONHASHSEED=0 "$work/env/bin/python" - <<'PY'
import json
import numpy as np
import safetensors
from safetensors.numpy import load, save

tensors = {name: np.arange(4, dtype=np.float32) + i for i, name in enumerate("abc")}
calls = 50
print("safetensors", safetensors.__version__)
counts = []
for keys in ("p", "pq", "pqrstu"):
    files = {save(tensors, metadata={key: f"value of {key}" for key in keys}) for _ in range(calls)}
    counts.append(len(files))
    print(f"{calls} calls, {len(keys)} keys of metadata: {len(files)} different files of one length")
    headers = [json.loads(f[8 : 8 + int.from_bytes(f[:8], "little")]) for f in files]
    assert all(header == headers[0] for header in headers), "they differ in more than order"
    assert all(np.array_equal(load(f)["b"], tensors["b"]) for f in files)
assert counts[0] == 1, "one key: the bytes changed"
assert counts[1] == 2 and counts[2] > 10, "the order is fixed now"
PY
