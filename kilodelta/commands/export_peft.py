"""`kilodelta export --peft`: the options of an adapter folder, and what is shown of one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar

import click

from kilodelta import terminal
from kilodelta.errors import InputError

if TYPE_CHECKING:
    from kilodelta.export.peft.adapter import PeftAdapter

F = TypeVar("F", bound=Callable[..., Any])

_OPTIONS = (
    click.option("--peft", is_flag=True, help="A PEFT LoRA adapter folder instead; no torch."),
    click.option("--svd", type=click.IntRange(1), help="With --peft: truncate to this rank."),
    click.option("--prefix", default="", help="With --peft: put before module names."),
    click.option(
        "--embedding", "embeddings", multiple=True, help="With --peft: globs of Embedding weights."
    ),
    click.option("--own-ranks", is_flag=True, help="With --peft: a rank_pattern, no zeros."),
    click.option("--as-loaded", is_flag=True, help="With --peft: names as transformers loads."),
)
_ALONE = ("svd", "prefix", "embeddings", "own_ranks", "as_loaded")
_OTHERS = ("onnx", "tensorrt", "external_data", "profiles", "triton", "tf32", "refittable")


def peft_options(function: F) -> F:
    """Add `--peft` and its companions to the export command, which never sees them."""

    @functools.wraps(function)
    def wrapped(*args: Any, peft: bool, **given: Any) -> Any:
        chosen = {name: given.pop(name) for name in _ALONE}
        if peft:
            return _run(given, chosen)
        if any(chosen.values()):
            name = next(name for name, value in chosen.items() if value)
            raise InputError(
                f"--{name.replace('_', '-')} is an option of adapters", fix="add --peft"
            )
        return function(*args, **given)

    for option in reversed(_OPTIONS):
        wrapped = option(wrapped)
    return wrapped  # type: ignore[return-value]


def _run(given: dict[str, Any], chosen: dict[str, Any]) -> Callable[[], None]:
    from kilodelta.export.peft.adapter import PeftOptions, export_peft

    refuse_others(given, "peft")
    options = PeftOptions(dtype=given["dtypes"][0], **chosen)
    done = export_peft(
        given["base"], given["file"], given["out"], options, progress=given["progress"]
    )
    if given["as_json"]:
        return lambda: terminal.print_json({**asdict(done), "path": str(done.path)})
    return lambda: _show(done)


def refuse_others(given: dict[str, Any], flag: str, more: tuple[str, ...] = ()) -> None:
    """Refuse the options that an export into an adapter's folder has no use for.

    Raises:
        InputError: one is given, or several precisions are.
    """
    for name in (*_OTHERS, *more):
        if given.get(name):
            raise InputError(
                f"--{flag} writes an adapter, --{name.replace('_', '-')} is for other exports",
                fix="run kilodelta export twice, into two folders",
            )
    if len(given["dtypes"]) != 1:
        raise InputError("an adapter has one precision", fix="give --dtype once")


def _show(done: PeftAdapter) -> None:
    facts = [
        ("adapter", f"{done.path}, {terminal.size(done.nbytes)}"),
        ("targets", f"{done.targets} modules, rank {done.rank}, {done.dtype}"),
        *(("saved whole", path) for path in done.modules_to_save),
        *(("bias", name) for name in done.biases),
        ("error", f"{done.error:.2e} of the update; {done.worst_error:.2e} in {done.worst}"),
    ]
    terminal.print_facts(facts)
