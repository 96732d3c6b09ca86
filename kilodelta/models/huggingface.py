"""Open a Hugging Face folder: its class, its weights, and the names of its tensors by proof.

transformers renames tensors while loading (a head adds a prefix, old names are modernised). So
the module is first loaded with a twin of the checkpoint; where each tensor arrived tells the
names. Then the real values are filled in by those names.

A folder is data: `trust_remote_code` is off, so Python code that lies in one is neither run nor
offered for running, and pipes and devices in it are not opened.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from kilodelta.errors import (
    CheckpointError,
    InputError,
    KiloDeltaError,
    is_failure,
    one_line,
    require,
)
from kilodelta.files import plain
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.files.tying import memory_of
from kilodelta.models import quantised
from kilodelta.models.inputs.examples import longest_text
from kilodelta.models.loaded import Kind, LoadedModel
from kilodelta.models.pooling import read_max_length, read_pooling
from kilodelta.models.quiet import quiet
from kilodelta.models.stacked import unstack
from kilodelta.models.twin import computed, match, unfilled, unique_views
from kilodelta.models.weights import TORCH, MappedCheckpoint, place

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json")
_FIX_ENTRY = (
    "build the module yourself, with the files' own tensor names in its state_dict, and name it "
    "by --model package.module:function"
)
_REASONABLE_LENGTH = 1 << 20  # transformers writes 10^30 where a tokenizer knows no limit
_READ_BY_TRANSFORMERS = frozenset({".json", ".txt", ".model", ".jinja"})


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
    _require_plain(folder)
    pooling = read_pooling(folder)
    config = _config(transformers, folder)
    kind = _class(transformers, config, headless=pooling is not None)
    checkpoint = Checkpoint.open(folder if weights is None else weights)
    quantised.refuse(checkpoint)
    with _explained(f"{folder}: {kind.__name__} cannot be built from config.json", _FIX_ENTRY):
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


@contextmanager
def _explained(what: str, fix: str) -> Iterator[None]:
    """Turn any error that transformers raises about a stranger's files into a sentence."""
    try:
        yield
    except (KiloDeltaError, MemoryError):
        raise
    except BaseException as error:
        if not is_failure(error):
            raise
        raise InputError(f"{what}: {one_line(error)}", fix=fix) from error


def _require_plain(folder: Path) -> None:
    """Refuse links, pipes and devices by name before transformers opens what it looks for.

    Links of the hub's cache to its own files are followed.
    """
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        is_read = path.suffix in _READ_BY_TRANSFORMERS and not path.is_dir()
        if is_read and not plain.is_model_file(path):
            raise CheckpointError(f"{path} {plain.kind(path)}", fix="put the file itself there")


def _config(transformers: Any, folder: Path) -> Any:
    _require_no_code(_read_config(folder), folder)
    with _explained(f"{folder}/config.json is not understood", _FIX_ENTRY):
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if getattr(config, "quantization_config", None) is not None:
        raise quantised.refusal(str(folder), "config.json has a quantization_config")
    _without_cache(config)
    return config


def _read_config(folder: Path) -> Mapping[str, Any]:
    place = folder / "config.json"
    if not place.exists():
        raise InputError(
            f"{folder} holds no config.json, so its architecture is not known",
            fix="give a Hugging Face folder, or the architecture's folder and these as weights",
        )
    with plain.explained(place, CheckpointError):
        text = plain.read_model_file(place)
    with _explained(f"{place} is not understood", "fetch the folder again"):
        config = json.loads(text)
    if not isinstance(config, dict):
        raise InputError(f"{place} holds no JSON object", fix="fetch the folder again")
    return config


def _require_no_code(config: Mapping[str, Any], folder: Path) -> None:
    """Refuse a model that only its folder's own Python could build."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    own = config.get("auto_map")
    if own and config.get("model_type") not in CONFIG_MAPPING:
        listed = ", ".join(map(str, own.values())) if isinstance(own, dict) else own
        raise InputError(
            f"{folder}/config.json names Python code of the folder ({listed:.200}), which is "
            "never run",
            fix=f"if you trust that code, {_FIX_ENTRY}",
        )


def _without_cache(config: Any) -> None:
    """Turn the cache of generation off, in the configurations inside as well."""
    config.use_cache = False
    for name in getattr(config, "sub_configs", ()):
        inner = getattr(config, name, None)
        if inner is not None:
            _without_cache(inner)


def _class(transformers: Any, config: Any, *, headless: bool) -> Any:
    """Find the class that config.json names, or the bare encoder below a sentence embedding."""
    names = getattr(config, "architectures", None) or []
    if headless or not names:
        bare = transformers.MODEL_MAPPING.get(type(config), None)
        kind = bare[0] if isinstance(bare, (tuple, list)) else bare
    else:
        kind = getattr(transformers, str(names[0]), None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise InputError(
            f"transformers {transformers.__version__} has no architecture "
            f"{names[0] if names else config.model_type}",
            fix=f"upgrade transformers, or {_FIX_ENTRY}",
        )
    return kind


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
            fix=_FIX_ENTRY,
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
    return [
        place
        for place, tensor in state.items()
        if place not in absent and tensor.numel() and memory_of(tensor) not in reached
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
    return "image" if main == "pixel_values" and modalities == ("image",) else "any"


def _has_decoder_inputs(module: nn.Module) -> bool:
    """DETR and its relatives call themselves encoder-decoders and take images alone."""
    import inspect

    return "decoder_input_ids" in inspect.signature(module.forward).parameters


def _tokenizer(transformers: Any, folder: Path) -> Any:
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    what = f"{folder}: the tokenizer cannot be opened"
    with _explained(what, "save it again with tokenizer.save_pretrained"), quiet():
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
