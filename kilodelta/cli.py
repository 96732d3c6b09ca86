"""The command line: arguments in, one function of the library called, its result shown."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, TypeVar

import click

from kilodelta import __version__, terminal
from kilodelta.errors import KiloDeltaError, require

F = TypeVar("F", bound=Callable[..., Any])

as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
quiet = click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
threads = click.option(
    "--threads", type=click.IntRange(1), help="Cores to use; all by default.", metavar="N"
)


class _Commands(click.Group):
    """Turns the library's errors into a sentence with a fix and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KiloDeltaError as error:
            if "--json" in sys.argv:
                terminal.print_json({"error": error.what, "fix": error.fix})
            terminal.print_error(error.what, error.fix)
            raise SystemExit(error.exit_code) from None
        except KeyboardInterrupt:
            terminal.print_error("interrupted", "nothing half-done was left behind; start again")
            raise SystemExit(130) from None
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(141) from None


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="kilodelta")
def main() -> None:
    """A fine-tuned model as base digest + seed + integer coefficients: kilobytes, merged back
    bit-identically on every machine."""


def _with_progress(function: F) -> F:
    """Hand a command `progress`, drawn unless --quiet or --json is given."""

    @quiet
    @functools.wraps(function)
    def wrapped(*args: Any, quiet: bool, **options: Any) -> Any:
        with terminal.progress(quiet=quiet or bool(options.get("as_json"))) as progress:
            show = function(*args, progress=progress, **options)
        if show is not None:
            show()

    return wrapped  # type: ignore[return-value]


@main.command()
@click.argument("file", type=click.Path())
@as_json
def inspect(file: str, as_json: bool) -> None:
    """Say what a .kd FILE is, what it needs, and where its bytes go."""
    from kilodelta.format.inspect import inspect

    found = inspect(file)
    if as_json:
        terminal.print_json(found.to_json())
        return
    options = ", ".join(f"{k} {v}" for k, v in found.method.items() if k != "name")
    terminal.print_facts(
        [
            ("file", f"{found.path}, {terminal.size(found.nbytes['file'])}"),
            ("base", f"{found.base['name'] or 'unnamed'}, {found.base['tensors']} tensors"),
            ("", found.base["root"]),
            ("method", f"{found.method['name']}: {options} ({found.paper})"),
            ("seed", found.seed),
            ("targets", f"{found.targets['count']}: {' '.join(found.targets['include'])}"),
            *(
                (k, " ".join(v))
                for k, v in found.targets.items()
                if k != "include" and isinstance(v, tuple) and v
            ),
            ("coefficients", f"{found.coefficients} of {found.bits} bits"),
            *(("extra", f"{name} {kind}") for name, kind in found.extras.items()),
            *(("probe", f"{name} {kind}") for name, kind in found.probes.items()),
            ("result", found.result),
            *(("made", f"{name} {value}") for name, value in found.made.items()),
            *(("bytes", f"{count:>9}  {part}") for part, count in found.nbytes.items()),
        ]
    )


@main.command()
@click.argument("model", type=click.Path())
@click.option("--tensors", is_flag=True, help="The digest of each tensor too.")
@click.option("--no-cache", is_flag=True, help="Hash every byte, trust no remembered digest.")
@threads
@as_json
@_with_progress
def digest(
    model: str, tensors: bool, no_cache: bool, threads: int | None, as_json: bool, progress: Any
) -> Callable[[], None]:
    """Print the root of a MODEL: a .safetensors file, a Hugging Face folder or cache folder."""
    from kilodelta.format.identity import digest

    found = digest(model, cache=not no_cache, threads=threads, progress=progress)

    def show() -> None:
        if as_json:
            listed = {"tensors": dict(found.tensors)} if tensors else {}
            terminal.print_json({"root": found.root, "count": len(found.tensors), **listed})
            return
        for name, text in found.tensors.items() if tensors else ():
            print(f"{text}  {name}")
        print(f"{found.root}  {model}" if not tensors else f"{found.root}  (root)")

    return show


@main.command()
@click.argument("base", type=click.Path())
@click.argument("file", type=click.Path())
@click.option(
    "-o", "--out", required=True, type=click.Path(), help="A new folder, or NAME.safetensors."
)
@threads
@as_json
@_with_progress
def merge(
    base: str, file: str, out: str, threads: int | None, as_json: bool, progress: Any
) -> Callable[[], None]:
    """Merge a .kd FILE into its BASE; the result's digest is proved while it is written."""
    from kilodelta.export.merge import merge

    done = merge(base, file, out, threads=threads, progress=progress)

    def show() -> None:
        if as_json:
            terminal.print_json({**asdict(done), "path": str(done.path)})
            return
        print(
            f"{done.path}: {done.targets} tensors merged, {done.extras} stored whole, "
            f"{done.copied} copied, {terminal.size(done.nbytes)}"
        )
        print(f"result proved: {done.result}")
        if done.left_out:
            print(f"left out, the base's weights in other forms: {' '.join(done.left_out)}")

    return show


@main.command()
@click.argument("base", type=click.Path())
@click.argument("file", type=click.Path())
@click.argument("merged", type=click.Path(), required=False)
@threads
@as_json
@_with_progress
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


_METHODS = ("nola", "randlora", "lora", "vera", "unilora")


@main.command()
@click.argument("base", type=click.Path())
@click.argument("tuned", type=click.Path())
@click.option("-o", "--out", required=True, type=click.Path(), help="The .kd file to write.")
@click.option(
    "--inputs",
    help="Unlabelled inputs: .jsonl, .txt, .npz, or package.module:function yielding batches.",
)
@click.option("--labels", help="Labels or queries, one a line, that embeddings are compared with.")
@click.option("--budget", help="Bytes of the whole file, such as 20KB (the default).")
@click.option("--method", type=click.Choice(_METHODS), help="Instead of the budget's choice.")
@click.option("--rank", type=click.IntRange(1), help="Rank of the method.")
@click.option("--bases", type=click.IntRange(1), help="Bases of NOLA, or Uni-LoRA's vector.")
@click.option("--bits", type=click.Choice(["4", "8", "16"]), help="Bits of a coefficient.")
@click.option("--targets", multiple=True, help="Globs of tensors to change; repeat.")
@click.option("--exclude", multiple=True, help="Globs of tensors to leave alone; repeat.")
@click.option(
    "--extras",
    default="auto",
    show_default=True,
    help="Other changed tensors to store whole: auto, all, none, or PATTERN[,PATTERN].",
)
@click.option("--steps", default=1000, show_default=True, type=click.IntRange(2))
@click.option("--lr", type=click.FloatRange(0, min_open=True), help="Learning rate.")
@click.option("--batch", default=32, show_default=True, type=click.IntRange(1))
@click.option(
    "--held-out", type=click.IntRange(1), help="Inputs to measure on; a tenth, 512 at most."
)
@click.option("--max-length", type=click.IntRange(1), help="Cut texts to so many tokens.")
@click.option("--field", default="text", show_default=True, help="The text's key in .jsonl.")
@click.option("--limit", type=click.IntRange(1), help="Read at most so many inputs.")
@click.option("--min-agreement", type=click.FloatRange(-1, 1), help="Exit 12 if it keeps less.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**63 - 1))
@click.option("--name", default="", help="What the base is called; its folder's name by default.")
@click.option("--model", help="package.module:function that builds the model.")
@click.option("--resume", is_flag=True, help="Go on with an interrupted run.")
@as_json
@_with_progress
def compress(
    base: str, tuned: str, out: str, resume: bool, as_json: bool, progress: Any, **given: Any
) -> Callable[[], None]:
    """Distil a TUNED model into a .kd file of kilobytes over its BASE.

    Without --inputs only --method lora is possible: a truncated SVD of the change.
    """
    require("torch", extra="hf", why="train a delta's coefficients")
    from kilodelta.compress.compress import compress, options_from

    inputs = given.pop("inputs")
    options = options_from(**given)
    report = compress(
        base, tuned, out, inputs=inputs, options=options, resume=resume, progress=progress
    )
    return lambda: terminal.show_compression(report, as_json=as_json)


@main.command()
@as_json
def doctor(as_json: bool) -> None:
    """Say what this machine can do, and the command that installs what is missing."""
    from kilodelta.verify.doctor import examine

    found = examine()
    if as_json:
        terminal.print_json(found.to_json())
        return
    for table in found.tables():
        terminal.print_table(table.title, table.columns, table.rows, right=table.right)
