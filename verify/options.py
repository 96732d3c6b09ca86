"""What is verified, and how: plain data that needs neither torch nor a runtime."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kilodelta.export.manifest.artefacts import Manifest
from kilodelta.files.checkpoint import Checkpoint


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to compare outputs, and what has to be run."""

    inputs: str | None = None
    """Real inputs, as `kilodelta.models.read_inputs` takes them; None compares no outputs."""

    against: str | None = None
    """The tuned model, to measure the merged model's agreement with."""

    device: str = "cpu"
    """Where torch computes the reference: `cpu` or `cuda`."""

    require: tuple[str, ...] = ()
    """Runners that must have run, by the names in `kilodelta.verify.runners.names`."""

    digests_only: bool = False
    """Let an export folder pass by its digests, running nothing."""

    report: str | None = None
    """A file to write the JSON to; its folder is looked for before any work."""

    limit: int | None = None
    """Read at most so many inputs."""

    max_length: int | None = None
    """Cut texts to so many tokens."""

    field: str = "text"
    labels: str | None = None
    """A text file, one label a line: agreement counts which of them an embedding is nearest to."""

    model: str | None = None
    """`package.module:function` that builds the module."""

    config: str | None = None
    """A folder with the tuned model's config.json, where the base's does not fit."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A base and a delta whose digests are proved, and what was made of them."""

    base: Checkpoint
    delta: Path
    merged: Path | None
    """A merged model, proved as well."""

    folder: Path | None
    export: Manifest | None
    """What an export folder holds, its digests proved; None where none was given."""
