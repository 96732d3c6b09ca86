#!/usr/bin/env bash
# The two lists of names in one LoraConfig are matched by two rules. target_modules=["head"] takes the
# module `head` alone (a dot before the name is asked for); modules_to_save=["head"] takes every path
# that ENDS so: `lm_head` and `overhead` are copied whole, trained and stored as well. A head meant to
# be 10 numbers brings a vocabulary's matrix into the adapter, and a LoRA on `lm_head` beside it is a
# TypeError about another module's type. One guesses: one rule for both. peft 0.21.2, torch 2.13.0.
# Met by whoever adds a head named like the end of another layer, or sizes adapters from their config.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q torch==2.13.0 peft==0.21.2 transformers==5.23.0
cat >"$work/try.py" <<'PY'
import peft, torch
from torch import nn

print("peft", peft.__version__, "torch", torch.__version__)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj, self.overhead = nn.Linear(4, 4), nn.Linear(4, 4)
        self.head, self.lm_head = nn.Linear(4, 2), nn.Linear(4, 300)

    def forward(self, x):
        x = self.overhead(self.proj(x))
        return self.head(x), self.lm_head(x)


def trained(**names):
    model = peft.get_peft_model(Model(), peft.LoraConfig(r=2, **names))
    paths = (n for n, p in model.named_parameters() if p.requires_grad)
    return sorted({path.split(".")[2] for path in paths})


targeted = trained(target_modules=["head"])
saved = trained(target_modules=["proj"], modules_to_save=["head"])
print("target_modules=['head'] trains ", targeted)
print("modules_to_save=['head'] trains", saved)
assert targeted == ["head"], targeted
assert saved == ["head", "lm_head", "overhead", "proj"], saved
try:
    trained(target_modules=["proj", "lm_head"], modules_to_save=["head"])
except TypeError as error:
    print("with a LoRA on lm_head beside it:", error)
else:
    raise SystemExit("no TypeError any more")
PY
"$work/env/bin/python" "$work/try.py"
