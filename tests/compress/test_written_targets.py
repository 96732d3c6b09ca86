"""Where inputs of an encoder-decoder lack a target, the tuned model writes it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from kilodelta.compress import Options
from kilodelta.compress.distill.compress import plan_of
from kilodelta.compress.distill.job import prepare
from kilodelta.compress.distill.learn.data import gather
from kilodelta.compress.distill.teacher.swap import as_tuned
from kilodelta.errors import InputError
from kilodelta.format.methods import UniLora
from kilodelta.models import open_model, open_source, read_inputs
from kilodelta.progress import silent
from tests.support import pico, seq2seq


def test_the_tuned_model_writes_what_a_record_lacks(tmp_path: Path) -> None:
    base = seq2seq.t5(tmp_path / "base")
    tuned = pico.tuned(base, tmp_path / "tuned", size=0.5)
    words = pico.WORDS.split()
    records = [{"text": f"{words[i]} {words[2 * i]}", "target": None} for i in range(10)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, records)) + "\n")
    job = prepare(
        base, tuned, tmp_path / "x.kd", Options(method=UniLora(bases=64), batch=8), learns=True
    )
    assert job.pair.student is not None
    data = gather(
        open_source(path), job.pair.student, as_tuned(job.pair, job.changes),
        plan_of(job, None), silent,
    )  # fmt: skip
    written = [row["decoder_input_ids"].tolist() for row in data.rows.rows]

    def by(model: Path) -> list[list[int]]:
        batches = read_inputs(path, open_model(model), batch_size=1)
        return [batch["decoder_input_ids"][0].tolist() for batch in batches]

    assert written == by(tuned)
    assert written != by(base)


def test_texts_alone_are_refused_with_the_way_to_write_targets(tmp_path: Path) -> None:
    path = pico.texts(tmp_path / "texts.txt", 10)
    with pytest.raises(InputError, match="says nothing of what the decoder of ") as why:
        read_inputs(path, open_model(seq2seq.t5(tmp_path / "t5")))
    assert '"target": null}' in why.value.fix
