"""Read from tensor names and `config.json` which module a target is for PEFT, without torch.

A safetensors file does not say whether a matrix belongs to a Linear, a Conv1D or an Embedding; PEFT
wants another form of adapter for each. Names decide, and what they cannot decide is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from kilodelta.errors import ExportError
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.format.targets import Target, matches
from kilodelta.models import layer_names
from kilodelta.models.layer_names import owner

WEIGHT = ".weight"
LANGUAGE_HEADS = ("LMHeadModel", "ForCausalLM", "ForMaskedLM", "ForConditionalGeneration")


class ModuleKind(Enum):
    """What PEFT takes a target's module for."""

    LINEAR = "linear"
    CONV1D = "conv1d"
    CONV = "conv"
    EMBEDDING = "embedding"
    STACK = "stack"


@dataclass(frozen=True, kw_only=True)
class StackedParameter:
    """A bare parameter that holds the matrices of several experts, as PEFT's wrapper finds it.

    Attributes:
        path: the module that holds it.
        attribute: its name there.
        order: its place among the module's parameters, in which PEFT wraps them.
        in_out: whether PEFT takes its rows for inputs, as the module's `is_transposed` says.
    """

    path: str
    attribute: str
    order: int
    in_out: bool


@dataclass(frozen=True, kw_only=True)
class ModuleNaming:
    """How the tensors of a base are called where the adapter will be used.

    Args:
        prefix: what the model that is adapted puts before the base's names, such as `transformer`.
        embeddings: globs of the tensors of Embedding modules; empty to tell by their names.
    """

    prefix: str = ""
    embeddings: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)

    def path(self, name: str) -> str:
        """Return the module that owns a tensor of the base, in the model that is adapted."""
        module = owner(name)
        return f"{self.prefix}.{module}" if self.prefix else module

    def kind(self, target: Target) -> ModuleKind:
        """Decide what a target's module is.

        Raises:
            ExportError: PEFT has no LoRA for it.
        """
        if target.part is not None:
            self.stack(target.tensor)
            return ModuleKind.STACK
        if not target.name.endswith(WEIGHT):
            raise refused(target.name, "is not the `weight` of a module, and LoRA adapts modules")
        if len(target.shape) > 5:
            raise refused(target.name, f"has {len(target.shape)} dimensions, as no layer of PEFT")
        if len(target.shape) > 2:
            if target.transposed:
                raise refused(target.name, "is a transposed convolution, which PEFT cannot adapt")
            return ModuleKind.CONV
        return self.matrix_kind(target)

    def stack(self, name: str) -> StackedParameter:
        """Return where PEFT finds a tensor that stacks the matrices of several experts.

        Raises:
            ExportError: only the model's code tells.
        """
        raise ExportError(
            f"{name} stacks the matrices of several experts, and only the model's code tells how"
            " PEFT names them",
            fix="--as-loaded loads the model and asks it",
        )

    def matrix_kind(self, target: Target) -> ModuleKind:
        """Decide what the module of a two-dimensional weight is."""
        if self._is_embedding(target.name):
            return ModuleKind.EMBEDDING
        return (
            ModuleKind.CONV1D
            if target.transposed or layer_names.is_conv1d(target.name, self.config)
            else ModuleKind.LINEAR
        )

    def _is_embedding(self, name: str) -> bool:
        if self.embeddings:
            return matches(name, self.embeddings)
        return layer_names.is_embedding(name)

    def check_untied(self, name: str, checkpoint: Checkpoint) -> None:
        """Refuse a weight that two layers of the model share.

        Raises:
            ExportError: PEFT would change the one and not the other.
        """
        if self.is_tied(name, checkpoint):
            raise refused(
                name, "is tied to another layer of the model, which an adapter would leave as it is"
            )

    def is_tied(self, name: str, checkpoint: Checkpoint) -> bool:
        """Return whether it is a language model's input embedding and its output layer."""
        shape = checkpoint.info(name).shape if name in checkpoint else ()
        if len(shape) != 2 or shape[0] != self.config.get("vocab_size") or not self._ties():
            return False
        return sum(checkpoint.info(other).shape == shape for other in checkpoint.names) == 1

    def _ties(self) -> bool:
        heads = self.config.get("architectures") or ()
        is_language = any(str(head).endswith(LANGUAGE_HEADS) for head in heads)
        return is_language and self.config.get("tie_word_embeddings", True) is not False


def refused(name: str, why: str) -> ExportError:
    """Make the error of a tensor that PEFT has no place for; `why` follows "it"."""
    return ExportError(
        f"{name} cannot travel in a PEFT adapter: it {why}",
        fix="kilodelta merge writes the whole model, whatever its layers",
    )


@dataclass(frozen=True, kw_only=True)
class StoredModules:
    """What an adapter stores whole: modules with all their tensors, and biases of its targets.

    `tensors` maps each tensor's name in the base or the delta to its key in the adapter.
    """

    modules: tuple[str, ...]
    biases: tuple[str, ...]
    tensors: Mapping[str, str]


def sort_extras(
    extras: Sequence[str], targets: Sequence[str], checkpoint: Checkpoint, naming: ModuleNaming
) -> StoredModules:
    """Decide where a delta's extras go: into modules that are saved whole, or as biases of targets.

    Args:
        extras: names of the delta's extras.
        targets: names of its targets.
        checkpoint: the base.
        naming: what the base's modules are called in the model that is adapted.

    Raises:
        ExportError: PEFT has no place for one; it is named.
    """
    paths = _module_paths({*checkpoint.names, *extras}, checkpoint, naming)
    adapted = {owner(name) for name in targets}
    biases = [name for name in extras if owner(name) in adapted]
    others = [name for name in extras if owner(name) not in adapted]
    for name in biases:
        _check_bias(name, checkpoint)
    for name in others:
        _check_module(name, paths)
        naming.check_untied(name, checkpoint)
    saved = {owner(name) for name in others}
    kept = [name for name in sorted({*checkpoint.names, *extras}) if owner(name) in saved]
    keys = {name: f"{paths[owner(name)]}.{name.rpartition('.')[2]}" for name in kept}
    keys |= {name: f"{paths[owner(name)]}.base_layer.bias" for name in biases}
    return StoredModules(
        modules=tuple(sorted(paths[module] for module in saved)),
        biases=tuple(biases),
        tensors={name: f"base_model.model.{key}" for name, key in keys.items()},
    )


def _module_paths(
    names: Iterable[str], checkpoint: Checkpoint, naming: ModuleNaming
) -> Mapping[str, str]:
    """Map every module that owns tensors to its path; only the base's get the prefix."""
    home = {owner(name): naming.path(name) for name in checkpoint.names}
    return {owner(name): home.get(owner(name), owner(name)) for name in names}


def _check_bias(name: str, checkpoint: Checkpoint) -> None:
    if not name.endswith(".bias") or name not in checkpoint:
        raise refused(name, "belongs to an adapted module, which can bring its own bias only")


def _check_module(name: str, paths: Mapping[str, str]) -> None:
    """See that the module of an extra can be saved whole, and alone."""
    module = owner(name)
    if not module:
        raise refused(name, "belongs to no module")
    inner = next((other for other in sorted(paths) if other.startswith(module + ".")), None)
    if inner:
        raise refused(name, f"belongs to {module}, which holds other modules too ({inner})")
    same = next(
        (o for o in sorted(paths) if o != module and paths[o].endswith(paths[module])), None
    )
    if same:
        raise refused(name, f"would replace {same} too: PEFT tells saved modules by their endings")
