"""Opening a model by what the user calls it: a folder, a hub id, or a function."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType

from torch import nn

from kilodelta.errors import CheckpointError, InputError
from kilodelta.format.checkpoint import Checkpoint
from kilodelta.models import huggingface
from kilodelta.models.entry import call_entry, is_entry
from kilodelta.models.fill import fill
from kilodelta.models.loaded import LoadedModel


def open_model(source: str | Path, *, weights: Checkpoint | str | Path | None = None) -> LoadedModel:
    """Open a model in eval mode (dropout off) with float32 weights.

    Args:
        source: a Hugging Face folder, a hub id (`org/name`), or `package.module:function`, which
            returns an `nn.Module` when called without arguments.
        weights: a checkpoint to take the weights from instead, such as a merge result. It may
            lack tensors that the architecture has (a new head): `LoadedModel.missing` names them.

    Raises:
        InputError: `source` is nothing of the kind, or an architecture that is not supported.
        CheckpointError: the weights are missing, damaged, or do not belong to the architecture.
        MissingPackageError: transformers is needed.

    Example:
        >>> open_model("distilbert/distilbert-base-uncased").names  # doctest: +SKIP
    """
    text = str(source)
    if Path(source).exists():
        return huggingface.open_folder(Path(source), weights)
    if is_entry(text):
        return _open_function(text, weights)
    if huggingface.is_hub_id(text):
        return huggingface.open_folder(huggingface.fetch(text), weights, source=text)
    raise InputError(
        f"{text} is not a model: no such folder, no hub id, no package.module:function",
        fix="check the path, or give a folder with config.json",
    )


def _open_function(spec: str, weights: Checkpoint | str | Path | None) -> LoadedModel:
    module = call_entry(spec)
    if not isinstance(module, nn.Module):
        raise InputError(
            f"{spec} returned a {type(module).__name__}", fix="return a torch.nn.Module"
        )
    module = module.eval().float()
    names = {name: name for name in _untied(module)}
    if weights is None:
        return _loaded(spec, module, names)
    checkpoint = Checkpoint.open(weights)
    found = _in_checkpoint(module, names, checkpoint)
    fill(module, checkpoint, found)
    return _loaded(
        spec,
        module,
        found,
        missing=tuple(name for name in names if name not in found),
        unused=tuple(name for name in checkpoint.names if name not in found),
    )


def _loaded(
    spec: str,
    module: nn.Module,
    names: dict[str, str],
    *,
    missing: tuple[str, ...] = (),
    unused: tuple[str, ...] = (),
) -> LoadedModel:
    return LoadedModel(
        source=spec,
        module=module,
        kind="any",
        names=MappingProxyType(names),
        missing=missing,
        unused=unused,
    )


def _untied(module: nn.Module) -> list[str]:
    """State names, tied tensors once under the name that sorts first, as digests count them."""
    places: dict[tuple[int, tuple[int, ...]], str] = {}
    state = module.state_dict()
    for name in sorted(state, key=str.encode):
        tensor = state[name]
        key = (tensor.data_ptr() if tensor.numel() else id(tensor), tuple(tensor.shape))
        places.setdefault(key, name)
    return list(places.values())


def _in_checkpoint(
    module: nn.Module, names: dict[str, str], checkpoint: Checkpoint
) -> dict[str, str]:
    """The module's tensors that a checkpoint holds, under the tied name that it uses."""
    state = module.state_dict()
    found = {name: name for name in checkpoint.names if name in state}
    if not found:
        raise CheckpointError(
            f"{checkpoint.path} holds none of the module's tensors, such as {next(iter(names), '')}",
            fix="give a checkpoint saved from this module's state_dict",
        )
    return found
