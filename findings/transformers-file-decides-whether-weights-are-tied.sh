#!/usr/bin/env bash
# tie_word_embeddings=true no longer means tied. Where the file also holds an lm_head.weight of other
# values (a tool changed one of the two, or kept an old head), transformers 5 loads the two apart, one
# log line at WARNING, leaves the configuration at true, and saves so again. The next call of
# tie_weights(), which resizing the vocabulary makes too, throws that head away in silence. One
# guesses: the configuration decides, as in version 4, or loading fails. transformers 5.23.0, torch
# 2.13.0. Met by tools that write merged checkpoints and by whoever counts a model's parameters.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q torch==2.13.0 transformers==5.23.0
cat >"$work/try.py" <<'PY'
import json, pathlib, sys
import torch, transformers
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

transformers.utils.logging.disable_progress_bar()
print("transformers", transformers.__version__, "torch", torch.__version__)
first, second = pathlib.Path(sys.argv[1], "first"), pathlib.Path(sys.argv[1], "second")
torch.manual_seed(0)
LlamaForCausalLM(LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True)).save_pretrained(first)
tensors = load_file(first / "model.safetensors")
assert "lm_head.weight" not in tensors
tensors["lm_head.weight"] = torch.randn(32, 16)
save_file(tensors, first / "model.safetensors", {"format": "pt"})


def is_tied(model):
    return model.lm_head.weight is model.model.embed_tokens.weight


model = LlamaForCausalLM.from_pretrained(first)
loaded, says = is_tied(model), model.config.tie_word_embeddings
model.save_pretrained(second)
saved_head = "lm_head.weight" in load_file(second / "model.safetensors")
saved_says = json.loads((second / "config.json").read_text())["tie_word_embeddings"]
model.resize_token_embeddings(34)
print(f"loaded tied: {loaded}, the configuration says {says}; saved with a head: {saved_head},"
      f" says {saved_says}; tied after a resize: {is_tied(model)}")
assert (loaded, says, saved_head, saved_says) == (False, True, True, True)
assert is_tied(model)
PY
"$work/env/bin/python" "$work/try.py" "$work"
