#!/usr/bin/env bash
# A fast tokenizer is changed by being called: `tokenizer(texts, truncation=True, max_length=4,
# padding="max_length")` sets both on the Rust object, and save_pretrained writes them into
# tokenizer.json, where a later call without arguments would have removed them again. transformers
# resets them at each call and shows nothing, but whoever reads the file by `tokenizers` itself (Rust
# and edge runtimes, Triton, ONNX pipelines) gets texts cut and padded to the length of somebody's last
# training batch, without a warning. One guesses: arguments of a call end with it. transformers 5.23.0,
# tokenizers 0.23.3. Met by whoever ships tokenizer.json to devices or digests it.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q transformers==5.23.0 tokenizers==0.23.3
cd "$work"
"$work/env/bin/python" - 2>/dev/null <<'PY'
import hashlib, json, pathlib
import tokenizers, transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

words = Tokenizer(models.WordLevel({"[UNK]": 0, "[PAD]": 1, "red": 2, "green": 3}, unk_token="[UNK]"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
fast = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]")
text = "red green " * 5

def saved(name):
    fast.save_pretrained(name)
    data = pathlib.Path(name, "tokenizer.json").read_bytes()
    alone = len(Tokenizer.from_file(f"{name}/tokenizer.json").encode(text).ids)
    through = len(AutoTokenizer.from_pretrained(name)(text)["input_ids"])
    state = {key: json.loads(data)[key] is not None for key in ("truncation", "padding")}
    print(f"{name:7} {hashlib.sha256(data).hexdigest()[:10]} {state}; 10 words become {alone} tokens"
          f" by tokenizers, {through} by transformers")
    return alone, through

print("transformers", transformers.__version__, "tokenizers", tokenizers.__version__)
before = saved("before")
fast(text, truncation=True, max_length=4, padding="max_length")
after = saved("after")
fast(text)
again = saved("again")
assert before == again == (10, 10)
assert after == (4, 10), "a call's arguments no longer travel"
PY
