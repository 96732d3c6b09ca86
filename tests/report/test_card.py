"""Model cards: what the hub's own library reads of them, and texts that stay texts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import kilodelta
from kilodelta.cli import main
from kilodelta.errors import InputError
from kilodelta.report.card import card
from tests.support.processes import GOLDEN


def contents(**more: Any) -> dict[str, Any]:
    return {**kilodelta.inspect(GOLDEN / "nola-8.kd").to_json(), **more}


def test_the_hub_reads_the_front_matter() -> None:
    repocard = pytest.importorskip("huggingface_hub.repocard")
    text = card(contents(), base_model="org/name", licence="apache-2.0")
    data = repocard.ModelCard(text).data.to_dict()
    assert data["library_name"] == "kilodelta"
    assert data["base_model"] == "org/name"
    assert data["license"] == "apache-2.0"
    assert data["tags"] == ["kilodelta", "nola"]
    assert data["base_model_relation"] == "adapter"
    bare = repocard.ModelCard(card(contents())).data.to_dict()
    assert "license" not in bare
    assert "base_model" not in bare


def test_it_says_what_the_file_is() -> None:
    made = {"agreement": 0.98, "held_out": 278, "steps": 800}
    text = card(contents(made=made))
    found = contents()
    assert found["result"] in text
    assert found["base"]["root"] in text
    assert f"{found['nbytes']['file']:,}" in text
    assert re.search(r"\| agreement with .* \| 0\.98 \|", text)
    assert "kilodelta merge base/ nola-8.kd -o merged/" in text


def test_texts_of_a_file_stay_texts() -> None:
    odd = "<script>|`\u001b[2J\n# x"
    text = card(contents(made={"agreement": odd}, extras={odd: "F32 [1]"}))
    assert "<script>" not in text
    assert "\u001b" not in text
    assert "\n# x" not in text


@pytest.mark.parametrize(
    "given", [{"base_model": "a b"}, {"base_model": "x\ny"}, {"licence": "MIT or so"}]
)
def test_odd_names_are_refused(given: dict[str, str]) -> None:
    with pytest.raises(InputError, match="is no"):
        card(contents(), **given)


def test_the_command_prints_the_card_as_it_is_written(tmp_path: Path) -> None:
    file, place = str(GOLDEN / "nola-8.kd"), tmp_path / "README.md"
    printed = CliRunner().invoke(main, ["card", file]).stdout
    written = CliRunner().invoke(main, ["card", file, "-o", str(place), "--json"]).stdout
    assert printed == place.read_text() == card(contents(path=file))
    assert json.loads(written) == {"out": str(place), "card": printed}
    assert json.loads(CliRunner().invoke(main, ["card", file, "--json"]).stdout) == {
        "card": printed
    }
