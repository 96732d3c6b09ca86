"""Open a model by what the user calls it: a folder, a hub name, or a function."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType

import torch
from torch import nn

from kilodelta.errors import CheckpointError, InputError
from kilodelta.files.checkpoint import Checkpoint, hub_snapshot
from kilodelta.files.tying import file_order, untied
from kilodelta.models import huggingface
from kilodelta.models.entry import call_entry, is_entry
from kilodelta.models.hub import is_hub_name, locate
from kilodelta.models.inputs.examples import longest_text
from kilodelta.models.loaded import LoadedModel
from kilodelta.models.twin import computed, unfilled
from kilodelta.models.weights import fill


def open_model(
    source: str | Path,
    *,
    weights: Checkpoint | str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    mapped: bool = False,
) -> LoadedModel:
    """Open a model in eval mode (dropout off).

    No code of the folder is run, and nothing is asked.

    Args:
        source: a Hugging Face folder, `hf:org/name` for a repository of the hub, or
            `package.module:function`, which returns an `nn.Module` when called without arguments.
        weights: a checkpoint to take the weights from instead, such as a merge result. It may
            lack tensors that the architecture has (a new head): `LoadedModel.missing` names them.
        dtype: of the float weights in memory, not of the files.
        mapped: let the weights of a folder that the files hold in `dtype` be the files' own memory,
            read when they are used, rather than copies. A file that is cut meanwhile kills the
            process.

    Raises:
        InputError: `source` is nothing of the kind, or an architecture that is not supported.
        CheckpointError: the weights are missing, damaged, or do not belong to the architecture.
        MissingPackageError: transformers is needed.

    Example:
        >>> open_model("hf:distilbert/distilbert-base-uncased").names  # doctest: +SKIP
    """
    text = str(source)
    if is_hub_name(text):
        return huggingface.open_folder(
            locate(text), weights, source=text, dtype=dtype, mapped=mapped
        )
    if Path(source).exists():
        folder = hub_snapshot(Path(source))
        return huggingface.open_folder(folder, weights, source=text, dtype=dtype, mapped=mapped)
    if is_entry(text):
        return _open_function(text, weights, dtype)
    raise InputError(
        f"{text} is no model: no folder of that name is here, and it is no package.module:function",
        fix="check the path; a repository of the Hugging Face hub is named hf:org/name",
    )


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
    own = computed(module, names)
    return LoadedModel(
        source=spec,
        module=module,
        kind="any",
        names=MappingProxyType(names),
        missing=tuple(place for place in unfilled(module, names) if place not in own),
        computed=own,
        unused=unused,
        max_length=longest_text(module),
    )


def _untied(module: nn.Module) -> list[str]:
    """List the state names, tied tensors once under the name by which digests count them."""
    state = module.state_dict()
    return list(untied({name: state[name] for name in file_order(module, state)}))


def _in_checkpoint(module: nn.Module, checkpoint: Checkpoint) -> dict[str, str]:
    """Match checkpoint names to state names.

    Names are equal, unless the module is a class of transformers, which renames some while
    loading: then a twin of the checkpoint shows where each arrives, as for a folder.
    """
    state = module.state_dict()
    names = {name: name for name in checkpoint.names if name in state}
    if len(names) < len(checkpoint.names):
        names = huggingface.names_by_twin(module, checkpoint) or names
    if not names:
        raise CheckpointError(
            f"{checkpoint.path} holds none of the module's tensors: {', '.join(list(state)[:3])}",
            fix="give a checkpoint saved from this module's state_dict",
        )
    return names
