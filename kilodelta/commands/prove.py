"""Proving: digests, and what artefacts compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import click

from kilodelta import terminal
from kilodelta.commands.shared import as_json, threads, with_progress


@click.command()
@click.argument("base", type=click.Path())
@click.argument("file", type=click.Path())
@click.argument("merged", type=click.Path(), required=False)
@threads
@as_json
@with_progress
def verify(
    base: str, file: str, merged: str | None, threads: int | None, as_json: bool, progress: Any
) -> Callable[[], None]:
    """Prove BASE and .kd FILE, and a MERGED model, reading every byte; exit 0 only if all hold."""
    from kilodelta.verify.proof import prove

    proof = prove(base, file, merged, threads=threads, progress=progress)

    def show() -> None:
        if as_json:
            terminal.print_json(asdict(proof))
            return
        rows = [
            ("base proved", proof.base),
            ("result proved", f"{proof.result} ({proof.targets} targets)"),
        ]
        if proof.merged:
            rows.append(("merged proved", proof.merged))
        terminal.print_facts(rows)

    return show
