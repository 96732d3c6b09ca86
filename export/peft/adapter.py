"""Write a low-rank delta as a PEFT LoRA adapter: the folder that `PeftModel.from_pretrained` opens.

Source: Hu et al., https://arxiv.org/abs/2106.09685, in the file layout of Hugging Face PEFT. Needs
neither torch nor PEFT.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kilodelta.errors import InputError
from kilodelta.export.peft.factors import (
    FactorPair,
    factor_pairs,
    relative_error,
    require_low_rank,
    top_rank,
)
from kilodelta.export.peft.folder import (
    AdapterPlan,
    adapter_config,
    adapter_tensors,
    make_plan,
    stored_tensors,
    write_folder,
)
from kilodelta.export.peft.loaded_names import naming_as_loaded
from kilodelta.export.peft.modules import ModuleNaming
from kilodelta.files import staging
from kilodelta.files.baseline import require_base
from kilodelta.files.checkpoint import Checkpoint, read_config
from kilodelta.files.dtypes import PRECISIONS
from kilodelta.format.delta import Delta
from kilodelta.format.file import load
from kilodelta.models.hub import locate, locate_delta
from kilodelta.progress import Progress, silent
from kilodelta.rehearsal import begin_work

MAX_SVD = 4096


@dataclass(frozen=True, kw_only=True)
class PeftOptions:
    """How an adapter is written.

    Args:
        dtype: of the factors: float32, float16 or bfloat16.
        svd: truncate every update to this rank; nothing keeps them exact.
        prefix: what the adapted model puts before the base's names, such as `transformer`.
        embeddings: globs of the weights of Embedding modules, where their names do not tell.
        as_loaded: name modules as transformers does once it has loaded the base, which can differ
            from its files, and learn from it what they are. Needs torch and transformers.
        own_ranks: each target with its own rank (`rank_pattern`) instead of zeros up to one rank.
    """

    dtype: str = "float32"
    svd: int | None = None
    prefix: str = ""
    embeddings: tuple[str, ...] = ()
    as_loaded: bool = False
    own_ranks: bool = False


@dataclass(frozen=True, kw_only=True)
class PeftAdapter:
    """What was written. Errors are relative Frobenius norms of the updates: of all together, and of
    the target `worst`."""

    path: Path
    targets: int
    rank: int
    dtype: str
    error: float
    worst: str
    worst_error: float
    modules_to_save: tuple[str, ...]
    biases: tuple[str, ...]
    nbytes: int


def export_peft(
    base: str | os.PathLike[str] | Checkpoint,
    delta: str | os.PathLike[str] | Delta,
    out: str | os.PathLike[str],
    options: PeftOptions | None = None,
    *,
    threads: int | None = None,
    progress: Progress = silent,
) -> PeftAdapter:
    """Write a delta as the folder of a PEFT LoRA adapter.

    Args:
        base: the model the fine-tune was made for.
        delta: a `.kd` file, or a `Delta`.
        out: a new folder.
        options: how the adapter is written.
        threads: cores to use; all by default.
        progress: called with how many factors are made.

    Raises:
        BaseMismatchError: `base` is another model.
        ExportError: the update has no low rank, or a tensor has no place in an adapter.
        InputError: an option makes no sense.
        OutputError: `out` holds something, or cannot be written.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from kilodelta.format.methods import Lora
        >>> from kilodelta.format.targets import Patterns
        >>> from kilodelta.merging.build import Recipe, build, quantise_target
        >>> base = "tests/golden/0.1.0/base.safetensors"
        >>> recipe = Recipe(method=Lora(rank=1), patterns=Patterns(include=("tall.weight",)))
        >>> values = {"A": np.ones((1, 4)), "B": np.ones((11, 1))}
        >>> delta = build(base, recipe, {"tall.weight": quantise_target(recipe.method, values, 8)})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     made = export_peft(base, delta, Path(folder, "lora"))
        >>> made.rank, made.error
        (1, 0.0)
    """
    chosen = options or PeftOptions()
    _check(chosen)
    checkpoint = Checkpoint.open(locate(base) if isinstance(base, str) else base)
    opened = delta if isinstance(delta, Delta) else load(locate_delta(delta))
    require_base(checkpoint, opened.manifest.base, threads=threads, progress=progress)
    bound = opened.bind(checkpoint)
    plan = make_plan(bound, checkpoint, _naming(chosen, checkpoint))
    if chosen.svd is None:
        require_low_rank(bound)
    staging.require_free(Path(out))
    begin_work(Path(out), targets=f"{len(bound.targets)} tensors", rank=chosen.svd or "exact")
    dtype = PRECISIONS[chosen.dtype].name
    pairs = factor_pairs(bound, dtype, chosen.svd, threads=threads, progress=progress)
    tensors, ranks = adapter_tensors(plan, pairs, dtype, own_ranks=chosen.own_ranks)
    tensors |= stored_tensors(plan.whole, bound, checkpoint)
    rank = top_rank(pairs)
    config = adapter_config(plan, ranks, rank, bound.manifest.base.name)
    nbytes = write_folder(Path(out), config, tensors)
    return _summary(Path(out), pairs, plan, rank, chosen, nbytes)


def _check(options: PeftOptions) -> None:
    if options.dtype not in PRECISIONS:
        raise InputError(
            f"adapters are not written in {options.dtype!r}",
            fix=f"choose one of {list(PRECISIONS)}",
        )
    if options.svd is not None and not 1 <= options.svd <= MAX_SVD:
        raise InputError(f"rank {options.svd} makes no sense", fix=f"choose 1 to {MAX_SVD}")
    if options.as_loaded and (options.prefix or options.embeddings):
        raise InputError(
            "names are taken from the loaded model or from the options, not from both",
            fix="leave --prefix and --embedding away beside --as-loaded",
        )
    if options.prefix.endswith("."):
        raise InputError(
            f"the prefix {options.prefix!r} ends in a dot", fix=f"--prefix {options.prefix[:-1]}"
        )


def _naming(options: PeftOptions, checkpoint: Checkpoint) -> ModuleNaming:
    if options.as_loaded:
        return naming_as_loaded(checkpoint)
    return ModuleNaming(
        prefix=options.prefix, embeddings=options.embeddings, config=read_config(checkpoint)
    )


def _summary(
    out: Path,
    pairs: Mapping[str, FactorPair],
    plan: AdapterPlan,
    rank: int,
    options: PeftOptions,
    nbytes: int,
) -> PeftAdapter:
    relative = {name: pair.error / pair.norm if pair.norm else 0.0 for name, pair in pairs.items()}
    worst = max(relative, key=lambda name: relative[name])
    return PeftAdapter(
        path=out,
        targets=len(pairs),
        rank=rank,
        dtype=options.dtype,
        error=relative_error(pairs.values()),
        worst=worst,
        worst_error=relative[worst],
        modules_to_save=plan.whole.modules,
        biases=plan.whole.biases,
        nbytes=nbytes,
    )
