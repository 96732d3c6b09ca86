"""How a user wants a model compressed: options, their defaults, checks and spelling.

Nothing here needs torch, so that a slip is answered at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from dataclasses import field as default
from types import MappingProxyType
from typing import Any

from kilodelta.compress.distill import budget as budgets
from kilodelta.compress.distill.precisions.wishes import check_for, parse_for
from kilodelta.errors import InputError
from kilodelta.format.methods import METHODS, Method
from kilodelta.format.packing import BITS

DTYPES = ("auto", "fp32", "mixed", "mixed-int8", "bf16", "fp16")
LOSS_ON = ("assistant", "all")
SHARD = ("auto", "always", "never")
BASELINES = ("svd", "lora")
NONE: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to compress; what is None is chosen by rule (docs/compress.md).

    Attributes:
        budget: bytes of the whole file; 20,000 where neither it nor a whole method is given.
        method: with its options; or its name alone, which leaves the size to the budget.
        bits: bits of a coefficient, 4, 8 or 16.
        targets: globs of tensors to change; every changed matrix of a layer by default.
        exclude: globs of tensors to leave alone: neither changed nor stored.
        extras: other changed tensors to store whole: `auto`, `all`, `none`, or globs joined by
            commas on top of `auto`.
        outputs: by name or glob, how much an output of the model counts; all, equally, by default.
        classes: by name or glob of an output, the axis that holds the classes.
        labels: a text file, one label or query per line, for models that embed texts: what counts
            is which of them an input is nearest to, by the base model's embeddings of them.
        steps: training steps.
        rate: learning rate; by default one that suits the method.
        tune: minutes to search for a better rate in, by short trainings; none by default.
        batch: inputs per training step.
        held_out: inputs to measure on; a tenth, 512 at most, by default.
        max_length: tokens that texts are cut to.
        field: the text's key in a `.jsonl` record.
        loss_on: of conversations and prompts with completions, the tokens that count:
            `assistant` or `all`.
        limit: inputs that are read at most.
        teacher_cache: a folder in which the tuned model's outputs are kept, for later runs on the
            same models and inputs with other budgets, methods or steps.
        min_agreement: raise `QualityError` where the result agrees less.
        baselines: other ways to spend the file's bytes, measured beside it: `svd`, a truncated
            SVD of the change, and `lora`, a LoRA that is trained alike and takes as long again.
            By default `svd` where a report or a curve is drawn, else none.
        precisions: what the file is to be good for, trained and measured each: of a quantised base
            `in-grid` and `beside` (both by default), of a float one `fp32`, `fp16` and those of
            `kilodelta.grid.precisions`.
        seed: of the bases, the batches and the choice of held-out inputs.
        name: what the base is called; its folder's name by default.
        device: `auto` (the first CUDA GPU, else the CPU), `cpu`, `cuda`, `cuda:N` or `mps`.
        dtype: of the frozen base: `fp32`, `bf16`, `fp16`, or `auto`, the type that the base is
            stored in where the device multiplies it in hardware, else float32. `mixed` is float32
            but for the products of a training, in bfloat16; `mixed-int8` has these in 8 bits.
        threads: cores to compute on; torch's choice by default.
        shard: among several processes, whether each holds a part of the base (`always`) or all of
            it (`never`); `auto` shards where the base would take more than half of a GPU's memory.
        gradient_checkpointing: keep the inputs of the model's blocks alone, and compute their
            activations a second time for the gradient: less memory for a third more time.
        model: `package.module:function` that builds the module, where the folders are bare
            checkpoints.
    """

    budget: int | None = None
    method: Method | str | None = None
    bits: int | None = None
    targets: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    extras: str = "auto"
    outputs: Mapping[str, float] = default(default_factory=dict)
    classes: Mapping[str, int] = default(default_factory=dict)
    labels: str | None = None
    steps: int = 800
    rate: float | None = None
    tune: float | None = None
    batch: int = 32
    held_out: int | None = None
    max_length: int | None = None
    field: str = "text"
    loss_on: str = "assistant"
    limit: int | None = None
    teacher_cache: str | None = None
    min_agreement: float | None = None
    baselines: tuple[str, ...] | None = None
    precisions: tuple[str, ...] = ()
    seed: int = 0
    name: str = ""
    device: str = "auto"
    dtype: str = "auto"
    threads: int | None = None
    shard: str = "auto"
    gradient_checkpointing: bool = False
    model: str | None = None


def check(options: Options, *, learns: bool) -> None:
    """Check the options' values, and that they belong together.

    Args:
        options: what a caller or a user gave.
        learns: whether there are inputs to learn from.

    Raises:
        InputError: a value is out of its range, or needs inputs.
    """
    for name, low, high in _RANGES:
        value = getattr(options, name)
        if value is not None and not low <= value <= high:
            raise InputError(f"{name} is {value}", fix=f"give {_range(low, high)}")
    if options.rate is not None and not 0 < options.rate < math.inf:
        raise InputError(f"rate is {options.rate}", fix="give a learning rate above 0")
    if options.tune is not None and not 0 < options.tune < math.inf:
        raise InputError(f"tune is {options.tune}", fix="give minutes above 0")
    if options.tune is not None and options.rate is not None:
        raise InputError(
            "--tune searches for a rate, and --lr gives one", fix="give one of the two"
        )
    for name, weight in options.outputs.items():
        if not 0 < weight < math.inf:
            raise InputError(
                f"output {name} has the weight {weight:g}", fix="give one above 0, or omit it"
            )
    if isinstance(options.method, str):
        _require_method(options.method)
    if options.dtype not in DTYPES:
        raise InputError(f"{options.dtype!r} is no type", fix=f"give one of {', '.join(DTYPES)}")
    if options.shard not in SHARD:
        raise InputError(f"shard is {options.shard!r}", fix=f"give one of {', '.join(SHARD)}")
    if options.loss_on not in LOSS_ON:
        raise InputError(f"loss on {options.loss_on!r}", fix=f"give one of {', '.join(LOSS_ON)}")
    if wrong := [name for name in options.baselines or () if name not in BASELINES]:
        raise InputError(
            f"{wrong[0]!r} is no baseline", fix=f"give {' or '.join(BASELINES)}, both, or none"
        )
    _check_bits(options)
    check_for(options.precisions, learns=learns)
    if not learns:
        _check_alone(options)


_RANGES: tuple[tuple[str, float, float], ...] = (
    ("budget", 1, 1 << 40),
    ("steps", 2, 1 << 31),
    ("batch", 1, 1 << 20),
    ("held_out", 1, 1 << 31),
    ("max_length", 1, 1 << 31),
    ("limit", 1, 1 << 40),
    ("min_agreement", -1, 1),
    ("seed", 0, (1 << 63) - 1),
    ("threads", 1, 1 << 16),
)


def _range(low: float, high: float) -> str:
    return f"{low:g} to {high:g}" if high <= 1 << 20 else f"{low:g} or more"


def _check_bits(options: Options) -> None:
    if options.bits is None:
        return
    given = options.method
    kind = METHODS[given] if isinstance(given, str) else given
    allowed: Sequence[int] = BITS if kind is None else kind.bits
    if options.bits not in allowed:
        what = "coefficients" if kind is None else f"{kind.name} coefficients"
        raise InputError(
            f"{what} cannot have {options.bits} bits",
            fix=f"choose one of {', '.join(map(str, allowed))}",
        )


def _check_alone(options: Options) -> None:
    """Without inputs nothing is trained and nothing compared."""
    needs = {
        "agreement cannot be measured": options.min_agreement is not None,
        "a rate cannot be searched for": options.tune is not None,
        "baselines cannot be measured": bool(options.baselines),
        "--labels cannot be compared with": options.labels is not None,
        "--outputs cannot be matched": bool(options.outputs),
        "--classes cannot be matched": bool(options.classes),
        "--lr trains nothing": options.rate is not None,
        "--teacher-cache keeps nothing": options.teacher_cache is not None,
        "--held-out keeps nothing back": options.held_out is not None,
        "--limit and --max-length cut nothing": (options.limit or options.max_length) is not None,
    }
    for what, given in needs.items():
        if given:
            raise InputError(f"{what} without inputs", fix="give --inputs")


def options_from(
    *,
    budget: str | None = None,
    method: str | None = None,
    rank: int | None = None,
    bases: int | None = None,
    bits: str | None = None,
    lr: float | None = None,
    outputs: Sequence[str] = (),
    classes: Sequence[str] = (),
    baselines: str | None = None,
    precisions: str | None = None,
    **others: Any,
) -> Options:
    """Make options from what a user types.

    Args:
        budget: such as `20KB`.
        method: its name.
        rank: of the method.
        bases: of the method.
        bits: `4`, `8` or `16`.
        lr: learning rate.
        outputs: `NAME` or `NAME=WEIGHT` each.
        classes: `NAME=AXIS` each.
        baselines: names with commas between them, or `none`.
        precisions: such as `beside,in-grid`.
        others: further fields of `Options`, by name.

    Raises:
        InputError: a size that is none, or an option that the method does not have.
    """
    if method is None and (rank or bases):
        raise InputError(
            "--rank and --bases belong to a method", fix="add --method, or give --budget alone"
        )
    for what, number in (("rank", rank), ("bases", bases)):
        if number is not None and number < 1:
            raise InputError(f"{what} is {number}", fix="give 1 or more")
    sized = method is None or not (rank or bases or budget is None)
    return Options(
        budget=None if budget is None else budgets.parse_bytes(budget),
        method=method if sized else _method(method or "", rank=rank, bases=bases),
        bits=None if bits is None else int(bits),
        rate=lr,
        precisions=parse_for(precisions),
        outputs={name: number for name, number in (_pair(text, "1", float) for text in outputs)},
        classes={name: axis for name, axis in (_pair(text, "", int) for text in classes)},
        baselines=None if baselines is None else _names(baselines),
        **others,
    )


def _names(text: str) -> tuple[str, ...]:
    return () if text == "none" else tuple(dict.fromkeys(text.split(",")))


def _pair(text: str, otherwise: str, kind: Any) -> tuple[str, Any]:
    """`NAME=NUMBER`, or a name alone where `otherwise` stands for the number."""
    name, equals, number = text.rpartition("=")
    name, number = (name, number) if equals else (text, otherwise)
    try:
        return name, kind(number)
    except ValueError:
        wanted = "NAME=AXIS, such as logits=1" if kind is int else "NAME or NAME=WEIGHT"
        raise InputError(f"{text!r} does not say which output", fix=f"give {wanted}") from None


def _require_method(name: str) -> None:
    if name not in METHODS:
        raise InputError(f"{name!r:.60} is no method", fix=f"choose one of {', '.join(METHODS)}")


def _method(name: str, **wanted: int | None) -> Method:
    _require_method(name)
    kind: Any = METHODS[name]
    given = {key: value for key, value in wanted.items() if value is not None}
    options = {option.name for option in fields(kind)}
    if unknown := sorted(set(given) - options):
        raise InputError(
            f"{name} has no {unknown[0]}", fix=f"its options: {', '.join(sorted(options))}"
        )
    found: Method = kind(**given)
    return found
