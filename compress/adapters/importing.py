"""The front of the import: the command `kilodelta import` as one function, with its options."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from kilodelta.compress.adapters.belonging import check_options
from kilodelta.compress.adapters.conversion import Imported, convert_adapter
from kilodelta.compress.adapters.reader import ReadOptions
from kilodelta.errors import InputError
from kilodelta.models import locate
from kilodelta.models.hub import name_of
from kilodelta.progress import Progress, silent


def import_adapter(
    adapter: str | Path,
    base: str | Path,
    out: str | Path,
    *,
    bits: int = 8,
    dtype: Literal["float32", "float16"] = "float32",
    basis_dtype: Literal["bfloat16", "float16"] | None = None,
    alpha: float | None = None,
    drawn_on: Literal["cpu"] | None = None,
    factors: str | Path = "",
    name: str = "",
    prefix: str = "",
    requantise: bool = False,
    method: str | None = None,
    rank: int | None = None,
    bases: int | None = None,
    inputs: str | Path | None = None,
    steps: int | None = None,
    model: str | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> Imported:
    """Turn an adapter of HF PEFT or of the official NOLA code into a `.kd` file.

    Every tensor of the adapter is used, or the import is refused by that tensor's name.

    Args:
        adapter: a PEFT folder (LoRA, RandLora, VeRA, Uni-LoRA), a checkpoint of official NOLA, or
            `hf:org/name` for a folder on the hub.
        base: the model that it was trained on: a folder, a `.safetensors` file or `hf:org/name`.
        out: the file to write.
        bits: of an integer coefficient: 4, 8 or 16.
        dtype: the type of the coefficients of a compatibility form.
        basis_dtype: the type in which PEFT drew its basis, where the adapter does not hold it.
        alpha: official NOLA's alpha, where its file does not say.
        drawn_on: where official NOLA's bases were drawn.
        factors: official NOLA's factors as a `.safetensors` file, for bases drawn on a GPU.
        name: what the base is called; its folder's name by default.
        prefix: where in the base the adapter's modules lie, if they fit in several places: a module
            path to put before theirs, or `OLD=NEW` to replace a front.
        requantise: into an exact integer method: a LoRA by truncated SVD, or with `inputs` by
            distillation.
        method: of `requantise`, by name.
        rank: of `requantise`.
        bases: of `requantise`.
        inputs: of `requantise`: unlabelled inputs, as for `compress`.
        steps: of `requantise`: of distillation.
        model: of `requantise`: `package.module:function` that builds the model.
        force: replace a file that is there; the adapter's and the base's are never replaced.
        progress: called as the work goes on.

    Returns:
        What the file holds and what was lost; with `requantise`, the report of `compress` in it.

    Raises:
        CheckpointError: the adapter's or the base's files are missing or damaged, or the hub does
            not give them.
        BaseMismatchError: the adapter was not made for this base.
        InputError: what the adapter does is not clear, no delta can hold it, or an option belongs
            to `requantise`, to `inputs` or to adapters of another kind.
        OutputError: `out` may not be replaced, or cannot be written.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from kilodelta.export import export_peft
        >>> from kilodelta.format.methods import Lora
        >>> from kilodelta.format.targets import Patterns
        >>> from kilodelta.merging.build import Recipe, build, quantise_target
        >>> base = "tests/golden/0.1.0/base.safetensors"
        >>> recipe = Recipe(method=Lora(rank=1), patterns=Patterns(include=("tall.weight",)))
        >>> values = {"A": np.ones((1, 4)), "B": np.ones((11, 1))}
        >>> delta = build(base, recipe, {"tall.weight": quantise_target(recipe.method, values, 8)})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     made = export_peft(base, delta, Path(folder, "adapter"))
        ...     got = import_adapter(made.path, base, Path(folder, "task.kd"), bits=16)
        >>> got.source, got.targets, got.error < 1e-4
        ('PEFT LoRA', 1, True)
    """
    name = name or name_of(base)
    adapter, base = locate(adapter), locate(base)
    options = ReadOptions(
        bits=bits,
        dtype=dtype,
        basis_dtype=basis_dtype,
        alpha=alpha,
        drawn_on=drawn_on,
        factors=str(factors),
        name=name,
        prefix=prefix,
    )
    how: dict[str, Any] = {
        "method": method,
        "rank": rank,
        "bases": bases,
        "inputs": inputs,
        "steps": steps,
        "model": model,
    }
    _check_requantise(how, requantise=requantise)
    check_options(adapter, options, requantise=requantise)
    if not requantise:
        return convert_adapter(adapter, base, out, options=options, force=force, progress=progress)
    from kilodelta.compress.adapters.requantise import requantise as run
    from kilodelta.compress.adapters.requantise import settings

    return run(
        adapter,
        base,
        out,
        options=options,
        how=settings(bits=bits, **how),
        inputs=inputs,
        force=force,
        progress=progress,
    )


def _check_requantise(how: dict[str, Any], *, requantise: bool) -> None:
    """Refuse options of a way that is not gone."""
    given = [key for key, value in how.items() if value is not None]
    if given and not requantise:
        raise InputError(f"--{given[0]} belongs to --requantise", fix="add --requantise")
    of_inputs = [key for key in ("steps", "model") if key in given]
    if of_inputs and "inputs" not in given:
        raise InputError(
            f"--{of_inputs[0]} belongs to --inputs: without them nothing is run",
            fix=f"add --inputs, or leave --{of_inputs[0]} out",
        )
