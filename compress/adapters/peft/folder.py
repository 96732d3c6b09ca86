"""A PEFT adapter folder beside its base: its configuration, its tensors, whose module they are.

`adapter_config.json` and `adapter_model.safetensors`, as HF PEFT's `save_pretrained` writes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from kilodelta.compress.adapters.peft import names, unilora_order
from kilodelta.compress.adapters.values import floats
from kilodelta.compress.distill.changes.patterns import patterns_for
from kilodelta.errors import CheckpointError, InputError
from kilodelta.files import canonical, dtypes, plain
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.files.tensor import RawTensor
from kilodelta.format.quantise import Floats
from kilodelta.format.targets import Patterns

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
CONFIG_LIMIT = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter and the base that it belongs to.

    `modules` maps the path of every adapted module, as the adapter's keys have it, to the base's
    tensor that it changes.
    """

    path: Path
    config: Mapping[str, Any]
    tensors: Checkpoint
    base: Checkpoint
    modules: Mapping[str, str]
    whole: Mapping[str, str]
    """Keys of tensors that replace the base's (`modules_to_save`, `bias`), to their names there."""

    def floats(self, key: str) -> Floats:
        """A tensor of the adapter as float32, exactly.

        Raises:
            CheckpointError: it is missing or of no float type.
            InputError: it holds NaN or infinity.
        """
        return floats(self.tensors, key)

    def shaped(self, key: str, shape: tuple[int, ...]) -> Floats:
        """The same, of one shape only.

        Raises:
            InputError: it has another shape.
        """
        found = self.tensors.info(key).shape
        if found != shape:
            raise InputError(
                f"{self.path}: tensor {key} has shape {found}, the base and {CONFIG} want {shape}",
                fix="give the adapter's own base and its unchanged configuration",
            )
        return self.floats(key)

    def option(self, name: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """One entry of the configuration.

        Raises:
            InputError: it is of another type.
        """
        value = self.config.get(name, default)
        types = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise InputError(
                f"{self.path / CONFIG}: {name} is {value!r:.80}",
                fix="give the configuration that PEFT wrote beside the adapter",
            )
        return value

    @property
    def rank(self) -> int:
        """`r`.

        Raises:
            InputError: it is no positive whole number.
        """
        rank: int = self.option("r", int)
        if rank < 1:
            raise InputError(
                f"{self.path / CONFIG}: r is {rank}", fix="r is a positive whole number"
            )
        return rank

    @cached_property
    def extras(self) -> dict[str, RawTensor]:
        """The tensors that replace the base's or are new, by their names there."""
        found = {}
        for key, name in self.whole.items():
            info = self.tensors.info(key)
            found[name] = RawTensor(dtype=info.dtype, shape=info.shape, data=self.tensors.data(key))
        return found

    def patterns(self, transposed: Sequence[str]) -> Patterns:
        """Few globs that choose exactly the adapted tensors; `transposed` ones are (in, out)."""
        chosen = sorted(self.modules.values())
        others = [name for name in self._matrices if name not in set(chosen)]
        straight = [name for name in chosen if name not in set(transposed)]
        return Patterns(
            include=patterns_for(chosen, others),
            transposed=patterns_for(transposed, straight) if transposed else (),
        )

    @property
    def _matrices(self) -> list[str]:
        infos = (self.base.info(name) for name in self.base.names)
        return [i.name for i in infos if i.dtype in dtypes.TARGETS and len(i.shape) >= 2]


def open_adapter(path: Path, base: Checkpoint) -> Adapter:
    """Read an adapter folder and find its modules in the base.

    Raises:
        CheckpointError: files are missing, damaged, or pickles.
        BaseMismatchError: the base lacks a module, or the adapter one of its targets.
    """
    config = read_config(path)
    tensors = Checkpoint.open(_weights(path))
    keys = names.sort_keys(tensors.names, str(config.get("peft_type")))
    paths = keys.modules
    if not paths and config.get("peft_type") == "UNILORA":
        paths = unilora_order.adapted_modules(config, base, path / CONFIG)
    place = names.find_modules(paths, base, path)
    names.check_targets(place, config, base, path)
    return Adapter(
        path=path,
        config=config,
        tensors=tensors,
        base=base,
        modules=place.tensors,
        whole={key: place.name(name) for key, name in keys.whole.items()},
    )


def read_config(path: Path) -> dict[str, Any]:
    """`adapter_config.json`.

    Raises:
        CheckpointError: it is missing, or no JSON object.
    """
    place = path / CONFIG
    try:
        found = canonical.loads(plain.read_model_file(place, CONFIG_LIMIT))
    except OSError as problem:
        raise CheckpointError(
            f"{place} cannot be read: {problem.strerror}",
            fix="give the folder that PEFT's save_pretrained wrote",
        ) from None
    except canonical.NotCanonicalError as problem:
        raise CheckpointError(f"{place} is not JSON: {problem}", fix="fetch it again") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{place} is not a JSON object", fix="fetch it again")
    return found


def _weights(path: Path) -> Path:
    place = path / WEIGHTS
    if not place.exists() and (path / PICKLE).exists():
        raise CheckpointError(
            f"{path} holds its tensors in {PICKLE}, a pickle: reading it could run anything",
            fix="load it with PEFT where you trust it, and save_pretrained(..., "
            "safe_serialization=True)",
        )
    return place
