"""Name every tensor that a model returns, and choose among them.

====================================  =========================================================
 `{"logits": t, "pred_boxes": u}`      `logits`, `pred_boxes`
 a transformers `ModelOutput`          its fields: `logits`, `last_hidden_state`, `pooler_output`
 `{"aux": {"logits": t}}`              `aux.logits`: nested outputs have dotted names
 `{"maps": (t, u)}`                    `maps.0`, `maps.1`
 a dataclass or a named tuple          its fields
 a tuple or list                       `output_0`, `output_1`, ...
 a bare tensor                         `output`
====================================  =========================================================

All of them count: they are distilled, exported and verified unless `--outputs` chooses. What is no
tensor is not an output: None, numbers, text, and the caches that generation keeps between steps
(`past_key_values`; a Hugging Face folder is opened with `use_cache` off). `hidden_states` and
`attentions` are returned, and so exported, only where config.json asks for them. A folder of
sentence-transformers puts out `sentence_embedding` alone by default, since its token states are
only a step towards it; `--outputs` reaches them by their names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from kilodelta.errors import InputError
from kilodelta.models.pooling import Pooling as Pooling

EMBEDDING = "sentence_embedding"
HIDDEN = "last_hidden_state"


class View(nn.Module):
    """A model as a function from named tensors to named tensors.

    It shares the loaded module; runners and exporters take it in the module's place.

    Args:
        module: takes the batch's tensors as keyword arguments.
        pooling: makes a sentence embedding of `last_hidden_state`.
        chosen: names or globs of the outputs to return; all declared outputs by default.
    """

    def __init__(
        self, module: nn.Module, pooling: Pooling | None = None, chosen: Sequence[str] = ()
    ) -> None:
        super().__init__()
        self.module, self.pooling, self.chosen = module, pooling, tuple(chosen)

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        """Compute the chosen outputs by name, in the model's order.

        Raises:
            InputError: the module returns no tensor, two of one name, or none that can be
                pooled; an output bears the name of an input; or a chosen output does not exist.
        """
        named = flatten(self.module(**batch))
        if self.pooling is not None:
            named = {EMBEDDING: self._pooled(named, batch), **named}
        chosen = self.chosen or ((EMBEDDING,) if self.pooling is not None else ("*",))
        return _require_new(choose(named, chosen), batch)

    def _pooled(self, named: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        if HIDDEN not in named:
            raise InputError(
                f"the model puts out {', '.join(named)}, which cannot be pooled",
                fix="remove modules.json from the folder to take the outputs as they are",
            )
        assert self.pooling is not None  # the caller has looked
        states = named[HIDDEN]
        ones = torch.ones_like(states[:, :, 0], dtype=torch.long)
        return self.pooling(states, batch.get("attention_mask", ones))


def choose(named: Mapping[str, Tensor], patterns: Iterable[str]) -> dict[str, Tensor]:
    """Keep the outputs that a name or glob of `patterns` matches, in the model's order.

    Raises:
        InputError: a pattern matches no output.

    Example:
        >>> outputs = {"logits": torch.zeros(1), "aux.logits": torch.ones(1)}
        >>> list(choose(outputs, ["aux.*"]))
        ['aux.logits']
    """
    wanted = tuple(patterns)
    for pattern in wanted:
        if not any(fnmatchcase(name, pattern) for name in named):
            raise InputError(
                f"the model has no output {pattern}", fix=f"choose among {', '.join(named)}"
            )
    return {n: t for n, t in named.items() if any(fnmatchcase(n, p) for p in wanted)}


def flatten(result: Any) -> dict[str, Tensor]:
    """Name every tensor in what a module returned; see the module's docstring.

    Raises:
        InputError: it holds no tensor, or two tensors of one name.

    Example:
        >>> list(flatten({"logits": torch.zeros(2), "aux": (torch.zeros(1), None)}))
        ['logits', 'aux.0']
    """
    if isinstance(result, Tensor):
        return {"output": result}
    unnamed = not _is_named(result)
    named: dict[str, Tensor] = {}
    for name, tensor in _walk(result, ""):
        full = f"output_{name}" if unnamed else name
        if full in named:
            raise InputError(
                f"the model returns two outputs named {full}", fix="give each a name of its own"
            )
        named[full] = tensor
    if not named:
        raise InputError(
            f"the model returns a {type(result).__name__} that holds no tensor",
            fix="return a tensor, a tuple of tensors, or a mapping from names to tensors",
        )
    return named


def _is_named(value: Any) -> bool:
    return isinstance(value, Mapping) or hasattr(value, "_fields") or _is_dataclass(value)


def _is_dataclass(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _children(value: Any) -> Iterable[tuple[str, Any]]:
    # ModelOutput is a mapping and a dataclass; as a mapping it leaves out the fields that are None.
    if isinstance(value, Mapping):
        return [(str(key), item) for key, item in value.items()]
    if hasattr(value, "_fields"):
        return zip(value._fields, value, strict=True)
    if isinstance(value, (tuple, list)):
        return [(str(index), item) for index, item in enumerate(value)]
    if _is_dataclass(value):
        return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    return ()


def _walk(value: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    for key, item in _children(value):
        name = f"{prefix}{key}"
        if isinstance(item, Tensor):
            yield name, item
        else:
            yield from _walk(item, f"{name}.")


def _require_new(named: dict[str, Tensor], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Refuse an output with an input's name: in an ONNX graph the two could not be told apart."""
    shared = [name for name in named if name in batch]
    if shared:
        raise InputError(
            f"the model's output {shared[0]} bears the name of an input",
            fix="rename the output in the module's forward, or leave it out with --outputs",
        )
    return named


def counted(named: Mapping[str, Any]) -> str:
    """Pick the most telling output: logits, the embedding, the last state, or the first."""
    for name in ("logits", EMBEDDING, HIDDEN):
        if name in named:
            return name
    return next(iter(named))
