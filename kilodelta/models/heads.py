"""What a model puts out, and which of it counts.

=====================  =================================================================
 logits                classifiers, decoders, image classifiers (`logits`, or several such as
                       `start_logits` and `end_logits`)
 sentence_embedding    sentence-transformers folders: pooled token states, normalised
 last_hidden_state     other encoders
 a module's own names  any other module; a bare tensor is called `output`
=====================  =================================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kilodelta.errors import InputError

EMBEDDING = "sentence_embedding"
HIDDEN = "last_hidden_state"


@dataclass(frozen=True, kw_only=True)
class Pooling:
    """From token states (batch, tokens, width) to one embedding (batch, width)."""

    mode: Literal["mean", "cls", "lasttoken"]
    normalise: bool

    def __call__(self, states: Tensor, mask: Tensor) -> Tensor:
        """The embedding; `mask` (batch, tokens) is 1 where a token counts, 0 at padding.

        A mean adds up in float32 whatever the states are, as sentence-transformers does; so does
        a norm, whose smallest value is below float16's.
        """
        pooled = _POOL[self.mode](states, mask)
        if not self.normalise:
            return pooled
        return nn.functional.normalize(pooled.float(), dim=-1).to(pooled.dtype)


def _mean(states: Tensor, mask: Tensor) -> Tensor:
    weights = mask.unsqueeze(-1).float()
    summed = (states.float() * weights).sum(1)
    return (summed / weights.sum(1).clamp(min=1.0)).to(states.dtype)


def _cls(states: Tensor, mask: Tensor) -> Tensor:
    return states[:, 0]


def _last(states: Tensor, mask: Tensor) -> Tensor:
    places = torch.arange(mask.shape[1], device=mask.device)
    last = (places * mask).argmax(1)
    return states.gather(1, last[:, None, None].expand(-1, 1, states.shape[2]))[:, 0]


_POOL = {"mean": _mean, "cls": _cls, "lasttoken": _last}


class View(nn.Module):
    """A model as a function from named tensors to named outputs, those that matter.

    It shares the loaded module; runners and exporters take it in the module's place.
    """

    def __init__(self, module: nn.Module, pooling: Pooling | None = None) -> None:
        super().__init__()
        self.module, self.pooling = module, pooling

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        """The outputs by name.

        Raises:
            InputError: the module returns no tensors, or none that can be pooled.
        """
        found = select(self.module(**batch))
        if self.pooling is None:
            return found
        if HIDDEN not in found:
            raise InputError(
                f"the model puts out {', '.join(found)}, which cannot be pooled",
                fix="remove modules.json from the folder to take the outputs as they are",
            )
        states = found[HIDDEN]
        mask = batch.get("attention_mask", torch.ones_like(states[:, :, 0], dtype=torch.long))
        return {EMBEDDING: self.pooling(states, mask)}


def counted(found: Mapping[str, Any]) -> str:
    """The name of the output that counts: logits, the embedding, the last state, or the first."""
    for name in ("logits", EMBEDDING, HIDDEN):
        if name in found:
            return name
    return next(iter(found))


def select(result: Any) -> dict[str, Tensor]:
    """The outputs that matter in whatever a module returns.

    Raises:
        InputError: there is no tensor in it.
    """
    named = _tensors(result)
    if not named:
        raise InputError(
            f"the model returns a {type(result).__name__} that holds no tensor",
            fix="return a tensor, a tuple of tensors, or a mapping from names to tensors",
        )
    logits = {name: tensor for name, tensor in named.items() if "logits" in name}
    if logits:
        return logits
    return {HIDDEN: named[HIDDEN]} if HIDDEN in named else named


def _tensors(result: Any) -> dict[str, Tensor]:
    if isinstance(result, Tensor):
        return {"output": result}
    if isinstance(result, Mapping):
        items = result.items()
    elif isinstance(result, (tuple, list)):
        items = {f"output_{index}": value for index, value in enumerate(result)}.items()
    else:
        items = {}.items()
    return {str(name): value for name, value in items if isinstance(value, Tensor)}
