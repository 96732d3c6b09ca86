"""A cache of the teacher's outputs is the tuned model's as it is now, or it is not used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch

from kilodelta.compress import Options
from kilodelta.compress.distill import facts
from kilodelta.compress.distill.job import prepare
from kilodelta.compress.distill.learn.outputs import Output
from kilodelta.compress.distill.teacher.same import require_same
from kilodelta.compress.distill.teacher.top_k import shorten
from kilodelta.errors import InputError
from kilodelta.format.methods import UniLora
from tests.support import pico


def logits(kept: int = 0) -> Output:
    return Output(
        name="logits", kind="classes", weight=1.0, axis=2, size=600, token_axes=(1,), kept=kept
    )


def differs(now: torch.Tensor, kept: torch.Tensor, output: Output, mask: Any = None) -> bool:
    try:
        require_same("cache", (output,), {"logits": now[None]}, {"logits": kept}, mask)
    except InputError as error:
        return "cache holds another logits" in error.what
    return False


def test_kept_outputs_are_the_model_s_up_to_rounding_or_refused() -> None:
    torch.manual_seed(0)
    one, other = 3 * torch.randn(4, 600), 3 * torch.randn(4, 600)
    rounded = one.bfloat16().float()
    for output, kept in ((logits(), one), (logits(128), shorten(one, 128))):
        assert not differs(one, kept, output)
        assert not differs(rounded, kept, output)
        assert differs(other, kept, output)
        assert differs(one[:3], kept, output)
        assert differs(one * torch.nan, kept, output)
        # What stands at padding is nobody's output.
        padding = torch.tensor([[1, 1, 1, 0]])
        assert not differs(torch.cat([one[:3], other[3:]]), kept, output, padding)
    ruled_out = one.clone()
    ruled_out[0, 5] = -torch.inf
    assert not differs(ruled_out, ruled_out, logits())
    assert differs(one, ruled_out, logits())


def changed(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_pooling_and_a_base_s_configuration_are_facts_of_a_cache(tmp_path: Path) -> None:
    def of(base: Path, tuned: Path) -> dict[str, str]:
        options = Options(method=UniLora(bases=64))
        return facts.teacher_facts(prepare(base, tuned, tmp_path / "x.kd", options, learns=True))

    base = pico.sentence_bert(tmp_path / "base")
    tuned = pico.tuned(base, tmp_path / "tuned")
    before = of(base, tuned)
    changed(
        tuned / "1_Pooling" / "config.json",
        pooling_mode_cls_token=True,
        pooling_mode_mean_tokens=False,
    )
    after = of(base, tuned)
    assert {key for key in after if after[key] != before.get(key)} == {"pooling"}

    shutil.copy(tuned / "model.safetensors", tmp_path / "bare.safetensors")
    before = of(base, tmp_path / "bare.safetensors")
    changed(base / "config.json", layer_norm_eps=0.5)
    after = of(base, tmp_path / "bare.safetensors")
    assert {key for key in after if after[key] != before.get(key)} == {"module"}
