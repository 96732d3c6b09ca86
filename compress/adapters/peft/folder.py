"""A PEFT adapter folder beside its base: its configuration, its tensors, whose tensors they change.

`adapter_config.json` and `adapter_model.safetensors`, as HF PEFT's `save_pretrained` writes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kilodelta.compress.adapters.architecture import AdaptedArchitecture, read_architecture
from kilodelta.compress.adapters.peft.config import CONFIG, AdapterConfig
from kilodelta.compress.adapters.peft.keys import Keys, sort_keys
from kilodelta.compress.adapters.peft.sites import AdapterSite, find_sites
from kilodelta.compress.adapters.peft.unilora_order import adapted_modules
from kilodelta.compress.adapters.placing import Place
from kilodelta.compress.adapters.tensors import AdapterTensors
from kilodelta.compress.distill.changes.patterns import patterns_for
from kilodelta.errors import CheckpointError, InputError
from kilodelta.files import dtypes
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.format.quantise import Floats
from kilodelta.format.targets import Patterns

WEIGHTS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter and the base that it belongs to."""

    path: Path
    config: AdapterConfig
    tensors: AdapterTensors
    keys: Keys
    architecture: AdaptedArchitecture
    place: Place
    sites: tuple[AdapterSite, ...]

    @property
    def base(self) -> Checkpoint:
        return self.architecture.base

    @property
    def rank(self) -> int:
        """`r`.

        Raises:
            InputError: it is no positive whole number.
        """
        return self.config.rank

    def option(self, name: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """Return one setting; see `AdapterConfig.option`."""
        return self.config.option(name, kind, default)

    def floats(self, key: str) -> Floats:
        """Take a tensor of the adapter as float32; see `AdapterTensors.floats`."""
        return self.tensors.floats(key)

    def shaped(self, key: str, shape: tuple[int, ...]) -> Floats:
        """Take a tensor of the adapter as float32, of one shape only.

        Raises:
            CheckpointError: it is missing or of no float type.
            InputError: it has another shape, or holds NaN or infinity.
        """
        actual = self.tensors.info(key).shape
        if actual != shape:
            raise InputError(
                f"{self.path}: tensor {key} has shape {actual}, the base and {CONFIG} want {shape}",
                fix="give the adapter's own base and its unchanged configuration"
                if actual and 0 not in actual
                else "it is empty: gather the parameters before saving (DeepSpeed ZeRO-3, FSDP)",
            )
        return self.tensors.floats(key)

    def matrices(self) -> dict[str, AdapterSite]:
        """Return the sites by the base's tensors, for methods that change whole tensors alone.

        Raises:
            InputError: a site is a stack of experts.
        """
        for site in self.sites:
            if site.stack is not None:
                raise InputError(
                    f"{self.path} adapts {site.name}, which the base holds as"
                    f" {len(site.tensors)} matrices",
                    fix="merge it with PEFT (merge_and_unload) and run kilodelta compress",
                )
        return {site.tensor: site for site in self.sites}

    def patterns(
        self, chosen: Sequence[str], transposed: Sequence[str], stacked: Sequence[str] = ()
    ) -> Patterns:
        """Make few globs that choose exactly some of the base's tensors.

        Args:
            chosen: the tensors to change.
            transposed: those of them that are stored (in, out).
            stacked: those of them of which every matrix has its own update.
        """
        wanted = set(chosen)
        others = [name for name in self._matrices if name not in wanted]

        def those(marked: Sequence[str]) -> tuple[str, ...]:
            unmarked = sorted(wanted - set(marked))
            return patterns_for(sorted(marked), unmarked) if marked else ()

        return Patterns(
            include=patterns_for(sorted(wanted), others),
            transposed=those(transposed),
            stacked=those(stacked),
        )

    @property
    def _matrices(self) -> list[str]:
        infos = (self.base.info(name) for name in self.base.names)
        return [i.name for i in infos if i.dtype in dtypes.TARGETS and len(i.shape) >= 2]


def open_adapter(path: Path, config: AdapterConfig, base: Checkpoint, prefix: str = "") -> Adapter:
    """Open an adapter's folder and find its modules in the base.

    Args:
        path: the folder.
        config: what `read_config` read there.
        base: the model that it was trained on.
        prefix: where in the base its modules lie, as in `placing.parse_prefix`.

    Raises:
        CheckpointError: files are missing, damaged, or pickles.
        BaseMismatchError: the base lacks a module, or the adapter one of its targets.
        InputError: a key, a setting or the place of the modules is not clear.
    """
    method = str(config.values.get("peft_type"))
    tensors = AdapterTensors(Checkpoint.open(_weights(path)))
    keys = sort_keys(tensors.names, method)
    tensors.use(keys.replaced)
    architecture = read_architecture(base, config.values)
    modules = keys.modules
    if not modules and method == "UNILORA":
        modules = adapted_modules(config, architecture)
    place, sites = find_sites(path, modules, architecture, config, tensors, prefix=prefix)
    return Adapter(
        path=path,
        config=config,
        tensors=tensors,
        keys=keys,
        architecture=architecture,
        place=place,
        sites=sites,
    )


def _weights(path: Path) -> Path:
    place = path / WEIGHTS
    if not place.exists() and (path / PICKLE).exists():
        raise CheckpointError(
            f"{path} holds its tensors in {PICKLE}, a pickle: reading it could run anything",
            fix="where you trust it, load it with PEFT and save it with "
            "model.save_pretrained(FOLDER), which writes .safetensors",
        )
    return place
