"""Opening a model by what the user calls it: a folder, a hub id, or a function."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType

import torch
from torch import nn

from kilodelta.errors import CheckpointError, InputError
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.files.tying import file_order, untied
from kilodelta.models import huggingface
from kilodelta.models.entry import call_entry, is_entry
from kilodelta.models.loaded import LoadedModel
from kilodelta.models.names import unfilled
from kilodelta.models.weights import fill


def open_model(
    source: str | Path,
    *,
    weights: Checkpoint | str | Path | None = None,
    dtype: torch.dtype = torch.float32,
) -> LoadedModel:
    """Open a model in eval mode (dropout off).

    Args:
        source: a Hugging Face folder, a hub id (`org/name`), or `package.module:function`, which
            returns an `nn.Module` when called without arguments.
        weights: a checkpoint to take the weights from instead, such as a merge result. It may
            lack tensors that the architecture has (a new head): `LoadedModel.missing` names them.
        dtype: of the float weights in memory, whatever the files hold.

    Raises:
        InputError: `source` is nothing of the kind, or an architecture that is not supported.
        CheckpointError: the weights are missing, damaged, or do not belong to the architecture.
        MissingPackageError: transformers is needed.

    Example:
        >>> open_model("distilbert/distilbert-base-uncased").names  # doctest: +SKIP
    """
    text = str(source)
    if Path(source).exists():
        return huggingface.open_folder(Path(source), weights, dtype=dtype)
    if is_entry(text):
        return _open_function(text, weights, dtype)
    if huggingface.is_hub_id(text):
        return huggingface.open_folder(huggingface.fetch(text), weights, source=text, dtype=dtype)
    raise InputError(
        f"{text} is not a model: no such folder, no hub id, no package.module:function",
        fix="check the path, or give a folder with config.json",
    )


def locate(source: str | Path) -> Path:
    """Where a model's files lie: the path itself, or what a hub id was downloaded to.

    Raises:
        CheckpointError: a hub id that cannot be fetched.
    """
    if Path(source).exists() or not huggingface.is_hub_id(str(source)):
        return Path(source)
    return huggingface.fetch(str(source))


def _open_function(
    spec: str, weights: Checkpoint | str | Path | None, dtype: torch.dtype
) -> LoadedModel:
    module = call_entry(spec)
    if not isinstance(module, nn.Module):
        raise InputError(
            f"{spec} returned a {type(module).__name__}", fix="return a torch.nn.Module"
        )
    module = module.eval().to(dtype)
    if weights is None:
        return _loaded(spec, module, {name: name for name in _untied(module)})
    checkpoint = Checkpoint.open(weights)
    names = _in_checkpoint(module, checkpoint)
    fill(module, checkpoint, names)
    unused = tuple(name for name in checkpoint.names if name not in names)
    return _loaded(spec, module, names, unused)


def _loaded(
    spec: str, module: nn.Module, names: dict[str, str], unused: tuple[str, ...] = ()
) -> LoadedModel:
    return LoadedModel(
        source=spec,
        module=module,
        kind="any",
        names=MappingProxyType(names),
        missing=unfilled(module, names),
        unused=unused,
    )


def _untied(module: nn.Module) -> list[str]:
    """List the state names, tied tensors once under the name by which digests count them."""
    state = module.state_dict()
    return list(untied({name: state[name] for name in file_order(module, state)}))


def _in_checkpoint(module: nn.Module, checkpoint: Checkpoint) -> dict[str, str]:
    """The tensors that checkpoint and module share, by their one name."""
    state = module.state_dict()
    found = {name: name for name in checkpoint.names if name in state}
    if not found:
        raise CheckpointError(
            f"{checkpoint.path} holds none of the module's tensors: {', '.join(list(state)[:3])}",
            fix="give a checkpoint saved from this module's state_dict",
        )
    return found
