"""Opening a Hugging Face folder: its class, its weights, and the names of its tensors by proof.

transformers renames tensors while loading (a head adds a prefix, old names are modernised). So
the module is first loaded with a twin of the checkpoint; where each tensor arrived tells the
names. Then the real values are filled in by those names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import nn

from kilodelta.errors import CheckpointError, InputError, require
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.files.tying import memory_of
from kilodelta.models import sentence
from kilodelta.models.loaded import LoadedModel
from kilodelta.models.names import match, unfilled
from kilodelta.models.quiet import quiet
from kilodelta.models.twin import unique
from kilodelta.models.weights import TORCH, fill

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_HUB_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json")
_FIX_ENTRY = "build the module yourself and name it as package.module:function"
_REASONABLE_LENGTH = 1 << 20  # transformers writes 10^30 where a tokenizer knows no limit


def is_hub_id(text: str) -> bool:
    """Whether a text could be the name of a repository on the Hugging Face hub."""
    return _HUB_ID.fullmatch(text) is not None


def fetch(name: str) -> Path:
    """Download a repository's safetensors, configuration and tokenizer, or find them cached.

    Raises:
        CheckpointError: there is no such repository, or no way to reach it.
    """
    hub = require("huggingface_hub", extra="hf", why="open models from the hub")
    try:
        with quiet():
            return Path(hub.snapshot_download(name, allow_patterns=list(_HUB_FILES)))
    except (OSError, ValueError) as error:  # all of the hub's own errors are among these
        raise CheckpointError(
            f"{name} is no folder here and cannot be fetched: {_first_line(error)}",
            fix="check the name, the network and the login, or give a local folder",
        ) from None


def open_folder(
    folder: Path,
    weights: Checkpoint | str | Path | None,
    *,
    source: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> LoadedModel:
    """Open a folder with `config.json`; see `kilodelta.models.open_model`."""
    transformers = require("transformers", extra="hf", why="open Hugging Face models")
    pooling = sentence.read_pooling(folder)
    config = _config(transformers, folder)
    kind = _class(transformers, config, headless=pooling is not None)
    checkpoint = Checkpoint.open(folder if weights is None else weights)
    module, names = _load(kind, config, checkpoint, dtype)
    fill(module, checkpoint, names)
    missing = unfilled(module, names)
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
        unused=tuple(name for name in checkpoint.names if name not in names),
        tokenizer=tokenizer,
        max_length=_max_length(folder, config, tokenizer),
        pooling=pooling,
    )


def _config(transformers: Any, folder: Path) -> Any:
    if not (folder / "config.json").is_file():
        raise InputError(
            f"{folder} holds no config.json, so its architecture is not known",
            fix="give a Hugging Face folder, or the architecture's folder and these as weights",
        )
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder}/config.json is not understood: {_first_line(error)}", fix=_FIX_ENTRY
        ) from None
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(
            f"{folder} holds a quantised model", fix="give the model before quantisation"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(
            f"{folder} is an encoder-decoder ({config.model_type}), which needs two inputs",
            fix=_FIX_ENTRY,
        )
    config.use_cache = False
    return config


def _class(transformers: Any, config: Any, *, headless: bool) -> Any:
    """The class that config.json names, or the bare encoder below a sentence embedding."""
    names = getattr(config, "architectures", None) or []
    if headless or not names:
        found = transformers.MODEL_MAPPING.get(type(config), None)
        return found[0] if isinstance(found, (tuple, list)) else found
    found = getattr(transformers, names[0], None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise InputError(
            f"transformers {transformers.__version__} has no architecture {names[0]}",
            fix=f"upgrade transformers, or {_FIX_ENTRY}",
        )
    return found


def _load(
    kind: Any, config: Any, checkpoint: Checkpoint, dtype: torch.dtype
) -> tuple[nn.Module, dict[str, str]]:
    """The module, its weights still the twin's, and checkpoint name to state name."""
    twin = unique(_specs(checkpoint, dtype))
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module, report = kind.from_pretrained(
            None,
            config=config,
            state_dict=dict(twin),
            torch_dtype=dtype,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    module = module.eval()
    names = match(twin, module.state_dict())
    _refuse_combined(module, names, report, checkpoint)
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


def _refuse_combined(
    module: nn.Module, names: Mapping[str, str], report: Mapping[str, Any], checkpoint: Checkpoint
) -> None:
    """Refuse tensors that transformers loads, but not as they are in the files."""
    state = module.state_dict()
    reached = {memory_of(state[place]) for place in names.values()}
    absent = {_name(entry) for key in ("missing_keys", "mismatched_keys") for entry in report[key]}
    changed = [
        place
        for place, tensor in state.items()
        if place not in absent and tensor.numel() and memory_of(tensor) not in reached
    ]
    if changed:
        raise CheckpointError(
            f"{checkpoint.path}: transformers makes {_some(changed)} out of several tensors",
            fix=_FIX_ENTRY,
        )


def _name(entry: Any) -> str:
    """The name in an entry of the loading report: a name, or a tuple that begins with it."""
    return str(entry[0] if isinstance(entry, (tuple, list)) else entry)


def _kind(module: Any) -> Literal["text", "image", "any"]:
    main = getattr(module, "main_input_name", "")
    if main == "input_ids":
        return "text"
    return "image" if main == "pixel_values" else "any"


def _tokenizer(transformers: Any, folder: Path) -> Any:
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    try:
        with quiet():
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(
            f"{folder}: the tokenizer cannot be opened: {_first_line(error)}",
            fix="save it again with tokenizer.save_pretrained",
        ) from None
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _max_length(folder: Path, config: Any, tokenizer: Any) -> int | None:
    """The smallest limit that the folder states, in tokens."""
    stated = (
        sentence.read_max_length(folder),
        getattr(tokenizer, "model_max_length", None),
        getattr(config, "max_position_embeddings", None),
    )
    limits = [limit for limit in stated if limit and limit < _REASONABLE_LENGTH]
    return min(limits, default=None)


def _some(names: tuple[str, ...] | list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
