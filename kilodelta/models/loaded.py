"""An opened model: the module, what reads its inputs, and the names of its tensors."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from torch import Tensor, nn

from kilodelta.models.heads import Pooling, View
from kilodelta.models.weights import MappedCheckpoint

Batch: TypeAlias = dict[str, Tensor]
"""Tensors by input name, all with the same first dimension: (batch, tokens) int64 for texts,
(batch, channels, height, width) float32 for images."""

Kind = Literal["text", "image", "any"]

_NO_INPUTS = frozenset({"past_key_values", "cache_position", "logits_to_keep"})
"""What the forward of a transformers class takes beside a batch's tensors: state of generation."""
_TRAINING = ("labels", "_label", "start_positions", "end_positions")
"""Endings of what it takes to compute a loss."""


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A module in eval mode; its weights are float32 unless another type was asked for.

    Two sets of names meet here. A *checkpoint* name is that of a tensor in the safetensors files,
    which deltas use; a *state* name is a key of `module.state_dict()`.
    """

    source: str
    """Where it came from: a folder, a hub name or `package.module:function`."""

    module: nn.Module

    kind: Kind
    """What it takes: `text` (token ids alone), `image` (pixels alone), or `any` other inputs."""

    names: Mapping[str, str]
    """Checkpoint name to state name, for every checkpoint tensor that the module has a place for;
    of tied tensors, the state name that comes first."""

    missing: tuple[str, ...] = ()
    """State names that no checkpoint tensor filled (a new head): random values, from seed 0."""

    computed: tuple[str, ...] = ()
    """State names that no checkpoint holds since the class computes them (Marian's positions)."""

    unused: tuple[str, ...] = ()
    """Checkpoint names that the module has no place for."""

    tokenizer: Any = None
    """A transformers tokenizer, or None."""

    max_length: int | None = None
    """The longest text in tokens, or None where nothing limits it."""

    pooling: Pooling | None = None
    """How token states become a sentence embedding (sentence-transformers), or None."""

    mapped: MappedCheckpoint | None = None
    """The files whose memory the weights are, where they were mapped and not copied."""

    chosen: tuple[str, ...] = ()
    """Names or globs of the outputs that count; empty for all that the model declares."""

    @property
    def accepts(self) -> tuple[str, ...]:
        """The names of the tensors that the module's forward takes.

        Of a transformers class these are its main input and the arguments annotated as tensors,
        other than labels and what generation keeps between steps; of any other module all
        arguments.
        """
        parameters = inspect.signature(self.module.forward).parameters
        named = {
            name: parameter
            for name, parameter in parameters.items()
            if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        }
        if self._main is None:
            return tuple(named)
        # Some classes annotate nothing, SigLIP's vision tower among them.
        return tuple(
            name
            for name, parameter in named.items()
            if name == self._main or (_is_tensor(parameter) and not _is_training(name))
        )

    @property
    def required(self) -> tuple[str, ...]:
        """The inputs that a batch must hold; a transformers class may ask for more by itself."""
        if self._main is not None:
            return (self._main,)
        parameters = inspect.signature(self.module.forward).parameters
        return tuple(n for n in self.accepts if parameters[n].default is inspect.Parameter.empty)

    @property
    def _main(self) -> str | None:
        """The main input of a transformers class; None for any other module."""
        name = getattr(self.module, "main_input_name", None)
        is_argument = name in inspect.signature(self.module.forward).parameters
        return name if hasattr(self.module, "config") and is_argument else None

    def choosing(self, patterns: Sequence[str]) -> LoadedModel:
        """Return the same model with other outputs: those that a name or glob matches.

        Args:
            patterns: as `--outputs` takes them; empty for the model's own choice.
        """
        return replace(self, chosen=tuple(patterns))

    def view(self) -> View:
        """Wrap the module as a function from named tensors to its named outputs."""
        return View(self.module, self.pooling, self.chosen)


def _is_tensor(parameter: inspect.Parameter) -> bool:
    return "Tensor" in str(parameter.annotation) and parameter.name not in _NO_INPUTS


def _is_training(name: str) -> bool:
    return name.endswith(_TRAINING) and name != "input_labels"  # SAM's points have labels


def outputs(loaded: LoadedModel, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Compute every output that counts, by name, in the model's order.

    Gradients flow as the caller's context says.

    Args:
        loaded: names that it has chosen (`LoadedModel.choosing`) limit what comes back.
        batch: tensors by input name; they are brought to the device of the weights, and floats to
            their type.

    Raises:
        InputError: the module returns no tensor, or lacks an output that was chosen.
    """
    named: dict[str, Tensor] = loaded.view()(**_placed(loaded.module, batch))
    return named


def _placed(module: nn.Module, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    weight = next((p for p in module.parameters() if p.is_floating_point()), None)
    if weight is None:
        return batch
    return {
        name: values.to(weight.device, weight.dtype if values.is_floating_point() else None)
        for name, values in batch.items()
    }
