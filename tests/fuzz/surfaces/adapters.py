"""Other tools' adapters: PEFT folders, and checkpoints of the official NOLA code."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

from kilodelta.compress.adapters import architecture
from kilodelta.compress.adapters.conversion import convert_adapter
from kilodelta.compress.adapters.reader import ReadOptions
from kilodelta.compress.adapters.skeleton import build_skeleton
from tests.fuzz.containers import safetensors_changed, zip_changed
from tests.fuzz.harness import Read, Surface
from tests.fuzz.mutations import ODD, TEXTS, json_changed

WEIGHTS = (safetensors_changed,)


def _peft(config: Callable[[], Any]) -> Callable[[Path, Path], Read]:
    def make(example: Path, trusted: Path) -> Read:
        from tests.support import adapters, pico

        base = pico.bert(trusted / "base", layers=1)
        skeleton = _remembered()
        adapters.save(adapters.wrap(base, "bert", config()), example / "adapter")
        for path in (example / "adapter").iterdir():
            if path.name not in (adapters.WEIGHTS, adapters.CONFIG):
                path.unlink()

        def read(work: Path) -> None:
            with mock.patch.object(architecture, "build_skeleton", skeleton):
                convert_adapter(
                    work / "adapter",
                    base,
                    work / "task.kd",
                    options=ReadOptions(basis_dtype="float16"),
                )

        return read

    return make


def _remembered() -> Callable[..., tuple[Any, bool]]:
    """Build the trusted base's class once for all that an adapter says of it."""

    @cache
    def built(folder: Path, said: str, count: int) -> tuple[Any, bool]:
        return build_skeleton(folder, json.loads(said), count)

    def skeleton(folder: Path, adapter: Mapping[str, Any], count: int) -> tuple[Any, bool]:
        said = {key: adapter.get(key) for key in ("auto_mapping", "task_type")}
        return built(folder, json.dumps(said), count)

    return skeleton


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

    from tests.support import nola_checkpoints

    base, _, file = nola_checkpoints.gpt2_case(trusted)
    (example / "nola.pt").write_bytes(file.read_bytes())
    return lambda work: convert_adapter(
        work / "nola.pt", base, work / "task.kd", options=ReadOptions(alpha=6.0, drawn_on="cpu")
    )


@cache
def _loaded(data: bytes) -> dict[str, Any]:
    import torch

    state: dict[str, Any] = torch.load(io.BytesIO(data), weights_only=True)
    return state


def checkpoint_changed(data: bytes, random: Random) -> bytes:
    """Replace an entry of a checkpoint by what `torch.save` writes and no honest tool would."""
    import torch

    state: Any = dict(_loaded(data))
    key = random.choice(list(state))
    # An expanded tensor is a few bytes in the file and its whole size once it is copied.
    values = (
        torch.zeros(1).expand(1 << 31),
        torch.zeros(1, 1).expand(1 << 20, 1 << 20),
        torch.eye(3).to_sparse(),
        torch.zeros(3, dtype=torch.complex64),
        torch.zeros(0),
        torch.tensor(float("nan")),
        torch.full((7,), float("inf")),
        torch.zeros(3, dtype=torch.bool),
        torch.zeros(7).double(),
        torch.zeros(7, dtype=torch.float8_e4m3fn),
        torch.tensor(2**62),
        torch.tensor([-1]),
        torch.zeros([1] * 20),
        torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8),
        torch.empty(3, device="meta"),
        torch.ones(4, 4).t()[1:, ::2],
        *ODD,
        "text",
        2**70,
        b"bytes",
        state,
    )
    step = random.randrange(5)
    if step == 0:
        state[random.choice((0, None, ("a", 1), *TEXTS))] = state.pop(key)
    elif step == 1:
        state = random.choice((list(state.values()), {"model": state}, [state], {}, None))
    else:
        state[key] = random.choice(values)
    out = io.BytesIO()
    torch.save(state, out)
    return out.getvalue()


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
        mutate={"*.pt": (zip_changed, checkpoint_changed, checkpoint_changed)},
        needs=("torch", "transformers"),
    ),
)
