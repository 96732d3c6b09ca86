"""Write a low-rank delta as a LoRA side-car of TensorRT Edge-LLM.

Source: the LoRA page of its documentation, 0.8.0 to 0.11.1: a folder of
`processed_adapter_model.safetensors` and `config.json`, which `process-lora` makes of a PEFT
adapter; the runtime reads the first by `available_lora_weights` of its input file. Factors are
float16, A (in, r) and B (r, out), with the scale alpha / r folded into B; here alpha equals r.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kilodelta.errors import ExportError, InputError
from kilodelta.export.edge_llm.names import check_inputs, check_places, engine_naming
from kilodelta.export.peft.factors import (
    FactorPair,
    factor_pairs,
    padded,
    relative_error,
    require_low_rank,
    top_rank,
)
from kilodelta.export.peft.folder import AdapterPlan, adapter_config, make_plan
from kilodelta.files import safetensors, staging
from kilodelta.files.baseline import require_base
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.files.tensor import RawTensor
from kilodelta.format.delta import Delta
from kilodelta.format.file import load
from kilodelta.models.hub import locate, locate_delta
from kilodelta.progress import Progress, silent
from kilodelta.rehearsal import begin_work

WEIGHTS, CONFIG = "processed_adapter_model.safetensors", "config.json"
DTYPE = "F16"
MAX_SVD = 4096


@dataclass(frozen=True, kw_only=True)
class EdgeLlmAdapter:
    """What was written.

    Attributes:
        path: the folder.
        weights: the file in it that `available_lora_weights` names.
        targets: matrices that it changes.
        rank: of every one of them; the engine's `--max-lora-rank` has to be this or more.
        error: Frobenius norm of what rounding and truncation lost, over the update's.
        checked: whether names and shapes were compared with those of a graph.
        nbytes: size of the weights.
    """

    path: Path
    weights: Path
    targets: int
    rank: int
    error: float
    checked: bool
    nbytes: int

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**vars(self), "path": str(self.path), "weights": str(self.weights)}


def export_edge_llm(
    base: str | os.PathLike[str] | Checkpoint,
    delta: str | os.PathLike[str] | Delta,
    out: str | os.PathLike[str],
    *,
    max_rank: int | None = None,
    graph: str | os.PathLike[str] | None = None,
    svd: int | None = None,
    threads: int | None = None,
    progress: Progress = silent,
) -> EdgeLlmAdapter:
    """Write a delta as a LoRA side-car for TensorRT Edge-LLM.

    Args:
        base: the model the delta is for, a folder with its `config.json`.
        delta: a `.kd` file, or a `Delta`.
        out: a new folder.
        max_rank: the `--max-lora-rank` of the engine; a higher rank is refused.
        graph: the `lora_model.onnx` of the engine, to compare names and shapes with.
        svd: truncate every update to this rank, for deltas of full rank.
        threads: None for one per core.
        progress: called with what is computed.

    Raises:
        BaseMismatchError: `base` is another model.
        CheckpointError: `graph` is no graph with LoRA inputs.
        ExportError: a tensor has no place in such an adapter or in the graph, the rank is above
            `max_rank`, or the updates have full rank.
        InputError: an option makes no sense.
        OutputError: `out` holds something, or cannot be written.
    """
    for option, value in (("--svd", svd), ("--max-rank", max_rank)):
        if value is not None and not 1 <= value <= MAX_SVD:
            raise InputError(f"{option} {value} makes no sense", fix=f"choose 1 to {MAX_SVD}")
    place = Path(out)
    checkpoint = Checkpoint.open(locate(base) if isinstance(base, str) else base)
    given = delta if isinstance(delta, Delta) else load(locate_delta(delta))
    require_base(checkpoint, given.manifest.base, threads=threads, progress=progress)
    bound = given.bind(checkpoint)
    naming = engine_naming(checkpoint)
    check_places(bound, naming)
    plan = make_plan(bound, checkpoint, naming)
    if graph is not None:
        check_inputs(bound, plan.paths, Path(graph))
    if svd is None:
        require_low_rank(bound)
    staging.require_free(place)
    begin_work(place, targets=f"{len(bound.targets)} tensors", rank=svd or "exact")
    pairs = factor_pairs(bound, DTYPE, svd, threads=threads, progress=progress)
    rank = top_rank(pairs)
    if max_rank is not None and rank > max_rank:
        raise ExportError(
            f"the update has rank {rank}, above the engine's {max_rank}",
            fix=f"build the engine with --max-lora-rank {rank}, or --svd {max_rank} here",
        )
    nbytes = _write(place, _tensors(plan, pairs, rank), _config(plan, rank, bound))
    return EdgeLlmAdapter(
        path=place,
        weights=place / WEIGHTS,
        targets=len(pairs),
        rank=rank,
        error=relative_error(pairs.values()),
        checked=graph is not None,
        nbytes=nbytes,
    )


def _tensors(plan: AdapterPlan, pairs: Mapping[str, FactorPair], rank: int) -> dict[str, RawTensor]:
    """Lay out the factors as the engine multiplies: x A B, one rank for all."""
    tensors = {}
    for name, pair in pairs.items():
        whole, stem = padded(pair, rank), plan.paths[name]
        tensors[f"{stem}.lora_A.weight"] = _raw(whole.A.T)
        tensors[f"{stem}.lora_B.weight"] = _raw(whole.B.T)
    return tensors


def _raw(values: Any) -> RawTensor:
    data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    return RawTensor(dtype=DTYPE, shape=values.shape, data=data)


def _config(plan: AdapterPlan, rank: int, delta: Delta) -> dict[str, Any]:
    """Return `config.json`: what PEFT's `adapter_config.json` says of the same adapter."""
    ranks = dict.fromkeys(plan.paths.values(), rank)
    return adapter_config(plan, ranks, rank, delta.manifest.base.name)


def _write(out: Path, tensors: Mapping[str, RawTensor], config: Mapping[str, Any]) -> int:
    with staging.new_folder(out) as stage:
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (stage / CONFIG).write_text(text, encoding="utf-8")
        return safetensors.write(stage / WEIGHTS, tensors)
