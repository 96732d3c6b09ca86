"""Tied weights: what happens where an adapter changes one of two layers that share a tensor.

In PEFT's live model each layer gets its own update, so the two part, unless the adapter was made
with `ensure_weight_tying`. A file holds the shared tensor once, and changing it would change both.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from kilodelta.compress.adapters.peft.folder import Adapter
from kilodelta.errors import InputError
from kilodelta.files.tensor import RawTensor


@dataclass(frozen=True, kw_only=True)
class SettledTies:
    """What an adapter's changes come to once ties are obeyed.

    Attributes:
        dropped: names in the model whose update is that of a tied tensor, which has it already.
        extras: tensors stored whole, by the names that they have in the files.
        config: what changes in the base's `config.json`.
    """

    dropped: frozenset[str] = frozenset()
    extras: Mapping[str, RawTensor] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)


def settle_ties(
    adapter: Adapter,
    updated: Collection[str],
    whole: Mapping[str, RawTensor],
    are_equal: Callable[[str, str], bool] = lambda first, second: False,
) -> SettledTies:
    """Settle every group of tied tensors that an adapter changes.

    Args:
        adapter: the adapter.
        updated: names in the model of the tensors that get an update.
        whole: tensors stored whole, by their names in the model.
        are_equal: tells whether two tensors get the same update.

    Raises:
        InputError: tied layers get different updates, which no file of the base's layout can hold.
    """
    dropped: set[str] = set()
    kept, config = dict(whole), {}
    for group in adapter.architecture.ties:
        if not any(name in updated or name in whole for name in group):
            continue
        first = group[0]
        if all(n in updated and (n == first or are_equal(first, n)) for n in group):
            dropped |= _repeated(adapter, group)
        elif all(n in whole and whole[first].equals(whole[n]) for n in group):
            for name in _repeated(adapter, group):
                del kept[name]
        else:
            kept |= _untied(adapter, group, updated, whole)
            config["tie_word_embeddings"] = False
    names, aliases = adapter.architecture.names, adapter.architecture.aliases
    # an alias that is left has parted from the tensor that the files hold for both
    extras = {n if n in aliases else names.get(n, n): tensor for n, tensor in kept.items()}
    return SettledTies(dropped=frozenset(dropped), extras=extras, config=config)


def _repeated(adapter: Adapter, group: tuple[str, ...]) -> set[str]:
    """Return the members of a group whose tensor in the base stands for another one already."""
    seen: set[str] = set()
    repeated = set()
    for name in group:
        tensor = adapter.architecture.names[name]
        if tensor in seen:
            repeated.add(name)
        seen.add(tensor)
    return repeated


def _untied(
    adapter: Adapter,
    group: tuple[str, ...],
    updated: Collection[str],
    whole: Mapping[str, RawTensor],
) -> dict[str, RawTensor]:
    """Give each of two tied layers a separate tensor, if what they become can be stored so.

    Raises:
        InputError: it cannot.
    """
    architecture = adapter.architecture
    changed = [name for name in group if name in updated or name in whole]
    missing = [name for name in group if name in architecture.aliases]
    is_known = architecture.config.get("tie_word_embeddings", True) is not False
    is_pair = len(group) == 2 and "text_config" not in architecture.config
    # A copy of a whole table for an update of kilobytes is not what anybody wants from a delta.
    is_small = all(
        name in whole or (name not in updated and changed[0] in whole) for name in missing
    )
    if not (is_known and is_pair and is_small):
        raise InputError(
            f"{' and '.join(group)} are one tensor in {adapter.base.path} (tied weights), and the"
            f" adapter changes {' and '.join(changed)} {'alone' if len(changed) == 1 else 'apart'}",
            fix="train it with ensure_weight_tying=True; or untie the base once (docs/import.md has"
            " the lines) and give that: the adapter fits it as it is",
        )
    return {
        name: adapter.base.raw(architecture.names[name]) for name in missing if name not in whole
    }
