#!/usr/bin/env bash
# Saving one and the same adapter twice gives two different adapter_config.json: PEFT turns the list
# target_modules into a set and writes that set in its own order, which Python's hash seed shuffles
# anew in every process. Weights are equal byte for byte, the folder's digest is not, so caches keyed
# by it miss, signatures and reproducible builds differ, and "the first target" is another one each
# run. Only PYTHONHASHSEED fixes it. One guesses: the order given, or sorted. peft 0.21.2, torch
# 2.13.0. Met by whoever hashes, signs or diffs adapter folders.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q torch==2.13.0 peft==0.21.2 transformers==5.23.0
cat >"$work/try.py" <<'PY'
import hashlib, json, pathlib, sys
import peft, torch
from torch import nn

torch.manual_seed(0)
names = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
model = nn.ModuleDict({name: nn.Linear(4, 4) for name in names})
config = peft.LoraConfig(r=2, target_modules=names)
peft.get_peft_model(model, config).save_pretrained(sys.argv[1])
folder = pathlib.Path(sys.argv[1])
digest = [hashlib.sha256((folder / name).read_bytes()).hexdigest()[:12]
          for name in ("adapter_model.safetensors", "adapter_config.json")]
print(*digest, *json.loads((folder / "adapter_config.json").read_text())["target_modules"])
PY
"$work/env/bin/python" -c 'import peft, torch; print("peft", peft.__version__, "torch", torch.__version__)'
for seed in 1 2 3; do
    PYTHONHASHSEED=$seed "$work/env/bin/python" "$work/try.py" "$work/adapter" 2>/dev/null | tee -a "$work/seen"
done
test "$(cut -d' ' -f1 "$work/seen" | sort -u | wc -l)" = 1 || { echo "the weights differ"; exit 1; }
test "$(cut -d' ' -f2 "$work/seen" | sort -u | wc -l)" -gt 1 || { echo "the order is fixed now"; exit 1; }
