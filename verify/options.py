"""What is verified, and how: plain data that needs neither torch nor a runtime."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kilodelta.export.manifest.facts import ExportManifest
from kilodelta.files.checkpoint import Checkpoint


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """How outputs are compared, and what has to run; `kilodelta.verify.verify` explains each.

    Attributes:
        inputs: real inputs, as `kilodelta.models.read_inputs` takes them; None compares no outputs.
        against: the tuned model.
        labels: a text file of labels, one per line.
        require: names of `kilodelta.verify.runners.names`.
        device: where torch computes, "cpu" or "cuda".
        limit: the most inputs to read.
        max_length: the most tokens of a text.
        field: the key of the text in a `.jsonl` record.
        model: `package.module:function` that builds the module.
        config: a folder with the tuned model's `config.json`.
        generate: let decoders write so many tokens after each prompt; None compares outputs.
        digests_only: run nothing.
        max_work: the most operations that the file may ask for; None: what suits the base's size.
        report: a file for the JSON.
    """

    inputs: str | None = None
    against: str | None = None
    labels: str | None = None
    require: tuple[str, ...] = ()
    device: str = "cpu"
    limit: int | None = None
    max_length: int | None = None
    field: str = "text"
    model: str | None = None
    config: str | None = None
    generate: int | None = None
    digests_only: bool = False
    max_work: float | None = None
    report: str | None = None


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A base and a delta whose digests are proved, and what was made of them.

    Attributes:
        base: the base's checkpoint; the path of a GGUF file or an ONNX graph.
        delta: the `.kd` file.
        merged: a merged model, proved as well; None if none was given.
        folder: an export folder; None if none was given.
        export: what it holds, its digests proved.
    """

    base: Checkpoint | Path
    delta: Path
    merged: Path | None = None
    folder: Path | None = None
    export: ExportManifest | None = None

    @property
    def place(self) -> Path:
        """The base's folder, or the one file that it is."""
        return self.base.folder if isinstance(self.base, Checkpoint) else self.base
