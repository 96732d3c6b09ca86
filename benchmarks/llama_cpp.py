"""Greedy text of llama.cpp with a GGUF LoRA, token by token beside the merged model's in torch.

    python benchmarks/llama_cpp.py BASE.gguf lora.gguf merged/ --inputs test.jsonl [--tokens 24]
        [--limit 50] [--json FILE]

BASE.gguf is run as it is, with its quantised products, and a second time with the same values
written in float32, where nothing but the order of sums parts the two programs. It needs the
packages gguf and xllamacpp (llama.cpp as a wheel).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe

from kilodelta.models import open_model
from kilodelta.models.generation.prompts import read_prompts


def in_float32(source: Path, out: Path) -> Path:
    """Write the values of a GGUF model without quantisation."""
    import gguf

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        kind, *inner = field.types
        value = 0 if name == "general.file_type" else field.contents()  # 0: all float32
        writer.add_key_value(name, value, kind, sub_type=inner[-1] if inner else None)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, np.ascontiguousarray(values, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def by_llama_cpp(
    model: Path, adapter: Path | None, prompts: Sequence[Sequence[int]], most: int
) -> list[list[int]]:
    """Continue prompts greedily, by token ids; an end token ends a text and is not in it."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_ctx = 1024
    params.warmup = False
    params.cpuparams.n_threads = torch.get_num_threads()
    if adapter is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    server = xllamacpp.Server(params)
    texts = []
    for ids in prompts:
        asked = {"prompt": list(ids), "n_predict": most, "temperature": -1, "n_probs": 1}
        answer = server.handle_completions({**asked, "cache_prompt": False})
        content = (answer["choices"][0].get("logprobs") or {}).get("content", [])
        texts.append([int(token["id"]) for token in content])
    return texts


def by_torch(
    folder: Path, prompts: Sequence[Sequence[int]], most: int, end: int
) -> list[list[int]]:
    """Continue prompts greedily with the merged model, likewise."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    texts = []
    for ids in prompts:
        given = torch.tensor([ids])
        made = model.generate(
            given,
            attention_mask=torch.ones_like(given),
            do_sample=False,
            max_new_tokens=most,
            pad_token_id=end,
        )
        texts.append(made[0, len(ids) :].tolist())
    return texts


def _until(text: Sequence[int], end: int) -> list[int]:
    return list(text[: text.index(end)] if end in text else text)


def main() -> None:
    """Print how many texts are equal, and where the others part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("base", type=Path, help="GGUF model")
    parser.add_argument("adapter", type=Path, help="GGUF LoRA")
    parser.add_argument("merged", type=Path, help="folder of the merged model")
    parser.add_argument("--inputs", required=True, help="prompts, as verify --generate takes them")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--limit", type=int, default=50)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    opened = open_model(given.merged)
    end = int(opened.tokenizer.eos_token_id)
    read = read_prompts(given.inputs, opened, field="text", limit=given.limit)
    prompts = [prompt.ids for prompt in read]
    wanted = [_until(text, end) for text in by_torch(given.merged, prompts, given.tokens, end)]
    report: dict[str, Any] = {"machine": describe(), "prompts": len(prompts)}
    with tempfile.TemporaryDirectory() as folder:
        floats = in_float32(given.base, Path(folder) / "float32.gguf")
        for name, model, adapter in (
            ("float32", floats, given.adapter),
            ("quantised", given.base, given.adapter),
            ("float32 without the LoRA", floats, None),
        ):
            texts = [_until(t, end) for t in by_llama_cpp(model, adapter, prompts, given.tokens)]
            equal = sum(a == b for a, b in zip(texts, wanted, strict=True))
            report[name] = {"equal": equal, "texts": opened.tokenizer.batch_decode(texts)}
            print(f"{name}: {equal} of {len(prompts)} texts are the merged model's", flush=True)
    report["merged"] = opened.tokenizer.batch_decode(wanted)
    if given.json:
        given.json.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
