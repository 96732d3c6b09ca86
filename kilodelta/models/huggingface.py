"""Open a Hugging Face folder: its class, its weights, and the names of its tensors by proof.

transformers renames tensors while loading (a head adds a prefix, old names are modernised). So
the module is first loaded with a twin of the checkpoint; where each tensor arrived tells the
names. Then the real values are filled in by those names.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from kilodelta.errors import CheckpointError, require
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.files.tying import memory_of
from kilodelta.models import quantised
from kilodelta.models.asked_size import check_modules, check_parameters
from kilodelta.models.configuration import (
    FIX_ENTRY,
    explained,
    find_class,
    read_config,
    require_plain,
)
from kilodelta.models.inputs.examples import longest_text
from kilodelta.models.loaded import Kind, LoadedModel
from kilodelta.models.pooling import read_max_length, read_pooling
from kilodelta.models.quiet import quiet
from kilodelta.models.stacked import unstack
from kilodelta.models.twin import computed, match, unfilled, unique_views
from kilodelta.models.weights import TORCH, MappedCheckpoint, place

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json")
_REASONABLE_LENGTH = 1 << 20  # transformers writes 10^30 where a tokenizer knows no limit


def open_folder(
    folder: Path,
    weights: Checkpoint | str | Path | None,
    *,
    source: str | None = None,
    dtype: torch.dtype = torch.float32,
    mapped: bool = False,
) -> LoadedModel:
    """Open a folder with `config.json`; see `kilodelta.models.open_model`.

    Args:
        folder: holds config.json, and the weights unless others are given.
        weights: a checkpoint to take the weights from instead.
        source: what the user called the folder.
        dtype: of the float weights in memory.
        mapped: let weights of that type be the files' own memory rather than copies.
    """
    transformers = require("transformers", extra="hf", why="open Hugging Face models")
    require_plain(folder)
    pooling = read_pooling(folder)
    config = read_config(transformers, folder)
    kind = find_class(transformers, config, headless=pooling is not None)
    checkpoint = Checkpoint.open(folder if weights is None else weights)
    quantised.refuse(checkpoint)
    check_modules(folder, len(checkpoint.names))
    check_parameters(folder, kind, config, checkpoint)
    with explained(f"{folder}: {kind.__name__} cannot be built from config.json", FIX_ENTRY):
        module, names = _load(kind, config, checkpoint, dtype)
    maps = MappedCheckpoint(checkpoint) if mapped else None
    place(module, checkpoint, names, maps)
    own = computed(module, names)
    missing = tuple(name for name in unfilled(module, names) if name not in own)
    if weights is None and missing:
        raise CheckpointError(
            f"{checkpoint.path} lacks {_some(missing)}, which {kind.__name__} needs",
            fix="give a folder whose config.json fits its weights",
        )
    tokenizer = _tokenizer(transformers, folder)
    return LoadedModel(
        source=source or str(folder),
        module=module,
        kind=_kind(module),
        names=MappingProxyType(names),
        missing=missing,
        computed=own,
        unused=tuple(name for name in checkpoint.names if name not in names),
        tokenizer=tokenizer,
        max_length=_max_length(folder, module, tokenizer),
        pooling=pooling,
        mapped=maps,
    )


def names_by_twin(module: nn.Module, checkpoint: Checkpoint) -> dict[str, str] | None:
    """Match a checkpoint's names to the state names of a module that the user built.

    Returns:
        Checkpoint name to state name; None for a module that is no class of transformers, or that
        differs from what its own configuration builds.

    Raises:
        CheckpointError: transformers makes a tensor of the module out of several of the files'.
    """
    if not _is_transformers(module):
        return None
    own, names = _load(type(module), module.config, checkpoint, torch.float32)
    return names if own.state_dict().keys() == module.state_dict().keys() else None


def _is_transformers(module: nn.Module) -> bool:
    return hasattr(module, "config") and hasattr(module, "main_input_name")


def _load(
    kind: Any, config: Any, checkpoint: Checkpoint, dtype: torch.dtype
) -> tuple[nn.Module, dict[str, str]]:
    """Load the module, its weights still the twin's; map checkpoint name to state name."""
    twin = unique_views(_specs(checkpoint, dtype))
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module, report = kind.from_pretrained(
            None,
            config=config,
            state_dict=dict(twin),
            torch_dtype=dtype,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            trust_remote_code=False,
        )
    module = module.eval()
    names = match(twin, module.state_dict())
    names |= unstack(module, _combined(module, names, report), twin, names)
    if combined := _combined(module, names, report):
        raise CheckpointError(
            f"{checkpoint.path}: transformers makes {_some(combined)} out of several tensors",
            fix=FIX_ENTRY,
        )
    return module, names


def _specs(
    checkpoint: Checkpoint, floats: torch.dtype
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of the twin: floats in the type of the module."""
    specs = {}
    for name in checkpoint.names:
        info = checkpoint.info(name)
        dtype = TORCH.get(info.dtype)
        if dtype is not None:
            specs[name] = (info.shape, floats if dtype.is_floating_point else dtype)
    return specs


def _combined(module: nn.Module, names: Mapping[str, str], report: Mapping[str, Any]) -> list[str]:
    """List state names of tensors that transformers loads, but not as they are in the files."""
    state = module.state_dict()
    reached = {memory_of(state[place]) for place in names.values()}
    absent = {_name(entry) for key in ("missing_keys", "mismatched_keys") for entry in report[key]}
    absent |= set(computed(module, names))
    # What is tied to a tensor of another shape (a head, to the words) is as absent as that is.
    reached |= {memory_of(state[place]) for place in absent if place in state}
    return [
        place
        for place, tensor in state.items()
        if tensor.numel() and memory_of(tensor) not in reached
    ]


def _name(entry: Any) -> str:
    """Return the name in an entry of the loading report: a name, or a tuple that begins with it."""
    return str(entry[0] if isinstance(entry, (tuple, list)) else entry)


def _kind(module: Any) -> Kind:
    """`text` or `image` for a module that takes nothing else; `any` for all others."""
    taken = getattr(module, "input_modalities", ())
    modalities = (taken,) if isinstance(taken, str) else tuple(taken)
    main = getattr(module, "main_input_name", "")
    if getattr(module.config, "is_encoder_decoder", False) and _has_decoder_inputs(module):
        return "any"
    if main == "input_ids" and modalities == ("text",):
        return "text"
    has_frames = hasattr(module.config, "num_frames")  # some models of videos call them images
    is_image = main == "pixel_values" and modalities == ("image",) and not has_frames
    return "image" if is_image else "any"


def _has_decoder_inputs(module: nn.Module) -> bool:
    """DETR and its relatives call themselves encoder-decoders and take images alone."""
    import inspect

    return "decoder_input_ids" in inspect.signature(module.forward).parameters


def _tokenizer(transformers: Any, folder: Path) -> Any:
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    what = f"{folder}: the tokenizer cannot be opened"
    with explained(what, "save it again with tokenizer.save_pretrained"), quiet():
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        tokenizer.padding_side = "right"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _max_length(folder: Path, module: nn.Module, tokenizer: Any) -> int | None:
    """Return the smallest limit that folder, tokenizer and position table state, in tokens."""
    stated = (
        read_max_length(folder),
        getattr(tokenizer, "model_max_length", None),
        longest_text(module),
    )
    limits = [n for n in stated if type(n) is int and 0 < n < _REASONABLE_LENGTH]
    return min(limits, default=None)


def _some(names: tuple[str, ...] | list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
