"""Other tools' adapters: PEFT folders, and checkpoints of the official NOLA code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from kilodelta.compress.adapters.conversion import convert_adapter
from kilodelta.compress.adapters.reader import ReadOptions
from tests.fuzz.containers import safetensors_changed, zip_changed
from tests.fuzz.harness import Read, Surface
from tests.fuzz.mutations import bytes_changed, json_changed

WEIGHTS = (safetensors_changed,)


def _peft(config: Callable[[], Any]) -> Callable[[Path, Path], Read]:
    def make(example: Path, trusted: Path) -> Read:
        from tests.support import adapters, pico

        base = pico.bert(trusted / "base")
        adapters.save(adapters.wrap(base, "bert", config()), example / "adapter")
        for path in (example / "adapter").iterdir():
            if path.name not in (adapters.WEIGHTS, adapters.CONFIG):
                path.unlink()
        return lambda work: convert_adapter(
            work / "adapter", base, work / "task.kd", options=ReadOptions(basis_dtype="float16")
        )

    return make


def _lora() -> Any:
    import peft

    return peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["query", "dense"],
        rank_pattern={"query": 2},
        alpha_pattern={r"layer\.0\..*": 3},
        modules_to_save=["pooler"],
    )


def _randlora() -> Any:
    import peft

    return peft.RandLoraConfig(r=4, target_modules=r".*\.query", save_projection=True)


def _vera() -> Any:
    import peft

    return peft.VeraConfig(r=4, target_modules=["query", "value"], save_projection=True)


def _official(example: Path, trusted: Path) -> Read:
    import torch

    from tests.support import nola_checkpoints

    base, layers, file = nola_checkpoints.gpt2_case(trusted)
    (example / "nola.pt").write_bytes(file.read_bytes())
    # Structures that an honest tool never writes, beside the one that is damaged.
    return lambda work: convert_adapter(
        work / "nola.pt", base, work / "task.kd", options=ReadOptions(alpha=6.0, drawn_on="cpu")
    )


_NEEDS = ("torch", "transformers", "peft")
_CHANGES = {"*.json": (json_changed,), "*.safetensors": WEIGHTS}
SURFACES = (
    *(
        Surface(name=f"peft-{name}", make=_peft(config), mutate=_CHANGES, needs=_NEEDS)
        for name, config in (("lora", _lora), ("randlora", _randlora), ("vera", _vera))
    ),
    Surface(
        name="official-pt",
        make=_official,
        mutate={"*.pt": (zip_changed, bytes_changed)},
        needs=("torch", "transformers"),
    ),
)
