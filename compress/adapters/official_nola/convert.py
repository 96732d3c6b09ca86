"""The official NOLA code's adapters into their compatibility form, or by their factors into LoRA.

Source: Koohpayegani et al., https://arxiv.org/abs/2310.02556, its authors' GPT-2 and LLaMA code.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from pathlib import Path

import numpy as np

from kilodelta.compress.adapters.low_rank import Product, low_rank_adapter
from kilodelta.compress.adapters.official_nola.checkpoint import (
    Factor,
    NolaCheckpoint,
    open_checkpoint,
    without_front,
)
from kilodelta.compress.adapters.official_nola.job import NolaJob, find_job
from kilodelta.compress.adapters.reader import ParsedAdapter, ReadOptions
from kilodelta.compress.adapters.tensors import floats
from kilodelta.errors import InputError
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.format.foreign import OfficialNola
from kilodelta.format.foreign.official_nola import mix
from kilodelta.format.methods import Lora
from kilodelta.format.quantise import Floats
from kilodelta.format.targets import Target
from kilodelta.merging.build import Recipe


def read(path: Path, base: Checkpoint, options: ReadOptions) -> ParsedAdapter:
    """Parse an official checkpoint; by `options.factors` where its bases were drawn on a GPU.

    Raises:
        CheckpointError: it is damaged or incomplete.
        BaseMismatchError: its layers are not the base's.
        InputError: alpha or the device of the bases is not known, or shapes do not agree.
    """
    job = find_job(open_checkpoint(path), base, options)
    if options.factors:
        return _by_factors(job, Checkpoint.open(options.factors))
    _require_cpu(job.checkpoint, options)
    return _by_bases(job)


def _require_cpu(checkpoint: NolaCheckpoint, options: ReadOptions) -> None:
    """Refuse bases that cannot be drawn again: only a CPU's numbers can."""
    reason = "numbers drawn on a CUDA device depend on the GPU model, and only CPU ones return"
    way = "--factors FILE with the factors computed on that GPU (docs/import.md has the lines)"
    if options.drawn_on != "cpu":
        raise InputError(
            f"{checkpoint.path} does not say where its bases were drawn: {reason}",
            fix=f"give {way}, or --drawn-on cpu if the training ran on a CPU",
        )
    if checkpoint.device is not None and "cuda" in checkpoint.device:
        raise InputError(
            f"{checkpoint.path} was saved from {checkpoint.device}: {reason}", fix=f"give {way}"
        )


def _by_bases(job: NolaJob) -> ParsedAdapter:
    own, factors = {}, {}
    for target in job.layout:
        own[target.name], factors[target.name] = _coefficients(job, target)
    return ParsedAdapter(
        source="official NOLA",
        recipe=_recipe(job, job.form, job.options.float_bits),
        coefficients=own,
        update=lambda name: Product(pair=factors[name]).update,
        notes=(
            "bases taken as drawn on a CPU in float32, drawn again and fingerprinted",
            "the official merge() multiplies lora_B.weight and lora_A.weight alone: not this",
            *filter(None, [job.note]),
        ),
    )


def _coefficients(job: NolaJob, target: Target) -> tuple[dict[str, Floats], tuple[Floats, Floats]]:
    """Return a target's groups, and the update's two factors in float64."""
    A, B = job.factors(target.name, "A"), job.factors(target.name, "B")
    drawn = [(_mixed(a), _mixed(b)) for a, b in zip(A, B, strict=True)]
    groups = {
        "seeds": np.array([(a.seed, b.seed) for a, b in zip(A, B, strict=True)]),
        "prints": np.array([[list(a[1]), list(b[1])] for a, b in drawn], np.uint8),
        "alpha": np.stack([factor.coefficients for factor in A]),
        "beta": np.stack([factor.coefficients for factor in B]),
        "A0": np.stack([factor.start for factor in A]),
    }
    if job.form.start == "both":
        groups["B0"] = np.stack([factor.start for factor in B])
    pair = _joined(job, target, [(b[0], a[0]) for a, b in drawn])
    return groups, pair


def _mixed(factor: Factor) -> tuple[Floats, bytes]:
    total, fingerprint = mix(factor.coefficients, factor.seed, factor.start.shape)
    return factor.start + total / sqrt(len(factor.coefficients)), fingerprint


def _joined(
    job: NolaJob, target: Target, pairs: list[tuple[Floats, Floats]]
) -> tuple[Floats, Floats]:
    """Join the parts' factors to those of the whole target, the scale in the left one."""
    rank, spans = job.form.rank, job.form.parts(target)
    left = np.zeros((target.matrix[0], len(spans) * rank))
    for p, (span, (B, _)) in enumerate(zip(spans, pairs, strict=True)):
        left[span.start : span.stop, p * rank : (p + 1) * rank] = job.form.scaling * B
    return left, np.concatenate([A for _, A in pairs]).astype(np.float64)


def _recipe(job: NolaJob, method: OfficialNola | Lora, bits: int) -> Recipe:
    return Recipe(method=method, patterns=job.patterns, bits=bits, name=job.options.name)


def _by_factors(job: NolaJob, given: Checkpoint) -> ParsedAdapter:
    """Parse the factors that the GPU computed as an exact LoRA."""
    keys = {without_front(key).replace(".default", ""): key for key in given.names}
    wanted = {
        f"{path}.lora_{side}": layer[side].start.shape
        for path, layer in job.checkpoint.layers.items()
        for side in "AB"
    }
    if wrong := sorted(keys.keys() ^ wanted.keys()):
        raise InputError(
            f"{given.path} and the checkpoint disagree about {wrong[0]}",
            fix="save one tensor for every NOLALinear, under its module's name",
        )
    for name, shape in wanted.items():
        if given.info(keys[name]).shape != shape:
            raise InputError(
                f"{given.path}: {keys[name]} has shape {given.info(keys[name]).shape}, not {shape}",
                fix="save the factor itself: generate_params(...) + weight",
            )
    products = {
        target.name: Product(
            pair=_given_pair(job, target, given, keys), transposed=target.transposed
        )
        for target in job.layout
    }
    return low_rank_adapter(
        "official NOLA, by its factors", products, _recipe(job, Lora(rank=1), job.options.bits)
    )


def _given_pair(
    job: NolaJob, target: Target, given: Checkpoint, keys: Mapping[str, str]
) -> tuple[Floats, Floats]:
    paths = job.parts[target.name]
    return _joined(
        job,
        target,
        [
            (floats(given, keys[f"{path}.lora_B"]), floats(given, keys[f"{path}.lora_A"]))
            for path in paths
        ],
    )
