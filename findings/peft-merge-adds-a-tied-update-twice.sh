#!/usr/bin/env bash
# With ensure_weight_tying=True, the option made for tied embeddings, PEFT's merged model is not its
# live model. Both tied layers are given one shared update, the live model adds it once in each, and
# merging adds it once FOR each to the one shared tensor: the table moves by twice the update, with no
# warning. unmerge takes both back, so a round trip looks sound. Leaving the option off is no way out
# (then PEFT merges the table's update into the head as well). peft 0.21.2, transformers 5.23.0,
# torch 2.13.0. Met by whoever trains embed_tokens of a tied decoder and ships the merged weights.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q torch==2.13.0 peft==0.21.2 transformers==5.23.0
cat >"$work/try.py" <<'PY'
import sys, warnings
import peft, torch, transformers
from transformers import LlamaConfig, LlamaForCausalLM

warnings.simplefilter("ignore")
transformers.utils.logging.disable_progress_bar()
print("peft", peft.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True))
table = model.get_input_embeddings().weight.detach().clone()
config = peft.LoraConfig(r=2, target_modules=["embed_tokens"], ensure_weight_tying=True,
                         init_lora_weights=False)
adapted = peft.get_peft_model(model, config).eval()
update = adapted.get_input_embeddings().get_delta_weight("default").detach()
ids = torch.arange(8)[None]
with torch.no_grad():
    live = adapted(ids).logits
    merged_model = adapted.merge_and_unload()
    merged = merged_model(ids).logits
moved = merged_model.get_input_embeddings().weight.detach() - table
times = float((moved * update).sum() / (update * update).sum())
apart = float((live - merged).abs().max() / live.abs().max())
print(f"the merged table moved by {times:.3f} updates; logits are {apart:.2f} of their size apart")
assert abs(times - 2) < 1e-3, "the shared table moves by another multiple now"
assert apart > 0.1, "live and merged agree now"
PY
"$work/env/bin/python" "$work/try.py"
