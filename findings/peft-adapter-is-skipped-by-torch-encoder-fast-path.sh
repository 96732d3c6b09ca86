#!/usr/bin/env bash
# A LoRA of PEFT on the linear layers of torch's nn.TransformerEncoder does nothing in eval mode, with
# or without no_grad: the fused path reads the weights behind the wrapped layers and never calls them.
# It counts in train mode and in merge_and_unload, so the live model that one validates is the base.
# On out_proj it does not even count in training, yet merging applies it. One guesses: wrapped modules
# are called, or the fast path steps aside. peft 0.21.2, torch 2.13.0, CPU. Met by whoever adapts
# encoders that are not from transformers and reads "the adapter learned nothing".
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q torch==2.13.0 peft==0.21.2 transformers==5.23.0
cat >"$work/try.py" <<'PY'
import copy, warnings
import peft, torch
from torch import nn

warnings.simplefilter("ignore")
print("peft", peft.__version__, "torch", torch.__version__)
x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
for targets, trains in ((["linear1", "linear2"], True), (["out_proj"], False)):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2))
    base = copy.deepcopy(model).eval()(x).detach()
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)

    def moved(model):
        return float((model(x) - base).detach().abs().max())

    with torch.no_grad():
        silent = moved(adapted.eval())
    with_grad, training = moved(adapted.eval()), moved(adapted.train())
    merged = moved(copy.deepcopy(adapted).merge_and_unload().eval())
    print(targets, f"eval {silent:.1e}, eval with gradients {with_grad:.1e}, train {training:.2f}, merged {merged:.2f}")
    assert max(silent, with_grad) < 1e-5, "the live adapter counts in eval mode now"
    assert (training > 0.1) is trains, "training takes the adapter otherwise now"
    assert merged > 0.1
PY
"$work/env/bin/python" "$work/try.py"
