"""Read a stranger's `config.json` as data, and find the class of transformers that it names.

No Python code that lies in a folder is run or offered for running (`trust_remote_code` is off), and
links, pipes and devices in it are not opened.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kilodelta.errors import CheckpointError, InputError, KiloDeltaError, is_failure, one_line
from kilodelta.files import plain
from kilodelta.models import quantised

FIX_ENTRY = (
    "build the module yourself, with the files' own tensor names in its state_dict, and name it "
    "by --model package.module:function"
)
_READ_BY_TRANSFORMERS = frozenset({".json", ".txt", ".model", ".jinja"})


@contextmanager
def explained(what: str, fix: str) -> Iterator[None]:
    """Turn any error that transformers raises about a stranger's files into a sentence."""
    try:
        yield
    except (KiloDeltaError, MemoryError):
        raise
    except BaseException as error:
        if not is_failure(error):
            raise
        raise InputError(f"{what}: {one_line(error)}", fix=fix) from error


def require_plain(folder: Path) -> None:
    """Refuse links, pipes and devices by name before transformers opens what it looks for.

    Links of the hub's cache to its own files are followed.
    """
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        is_read = path.suffix in _READ_BY_TRANSFORMERS and not path.is_dir()
        if is_read and not plain.is_model_file(path):
            raise CheckpointError(f"{path} {plain.kind(path)}", fix="put the file itself there")


def read_config(transformers: Any, folder: Path) -> Any:
    """Read a folder's configuration, with the cache of generation turned off.

    Args:
        transformers: the package.
        folder: holds config.json.

    Raises:
        InputError: it is missing, not understood, or names Python code of the folder.
        CheckpointError: it is no plain file, or states a quantised model.
    """
    _require_no_code(_config_json(folder), folder)
    with explained(f"{folder}/config.json is not understood", FIX_ENTRY):
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if getattr(config, "quantization_config", None) is not None:
        raise quantised.refusal(str(folder), "config.json has a quantization_config")
    _without_cache(config)
    return config


def _config_json(folder: Path) -> Mapping[str, Any]:
    place = folder / "config.json"
    if not place.exists():
        raise InputError(
            f"{folder} holds no config.json, so its architecture is not known",
            fix="give a Hugging Face folder, or the architecture's folder and these as weights",
        )
    with plain.explained(place, CheckpointError):
        text = plain.read_model_file(place)
    with explained(f"{place} is not understood", "fetch the folder again"):
        config = json.loads(text)
    if not isinstance(config, dict):
        raise InputError(f"{place} holds no JSON object", fix="fetch the folder again")
    return config


def _require_no_code(config: Mapping[str, Any], folder: Path) -> None:
    """Refuse a model that only its folder's own Python could build."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    own = config.get("auto_map")
    if own and config.get("model_type") not in CONFIG_MAPPING:
        listed = ", ".join(map(str, own.values())) if isinstance(own, dict) else own
        raise InputError(
            f"{folder}/config.json names Python code of the folder ({listed:.200}), which is "
            "never run",
            fix=f"if you trust that code, {FIX_ENTRY}",
        )


def _without_cache(config: Any) -> None:
    """Turn the cache of generation off, in the configurations inside as well."""
    config.use_cache = False
    for name in getattr(config, "sub_configs", ()):
        inner = getattr(config, name, None)
        if inner is not None:
            _without_cache(inner)


def find_class(transformers: Any, config: Any, *, headless: bool) -> Any:
    """Find the class that config.json names, or the bare encoder below a sentence embedding.

    Raises:
        InputError: this transformers has no such class.
    """
    names = getattr(config, "architectures", None) or []
    if headless or not names:
        bare = transformers.MODEL_MAPPING.get(type(config), None)
        kind = bare[0] if isinstance(bare, (tuple, list)) else bare
    else:
        kind = getattr(transformers, str(names[0]), None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise InputError(
            f"transformers {transformers.__version__} has no architecture "
            f"{names[0] if names else config.model_type}",
            fix=f"upgrade transformers, or {FIX_ENTRY}",
        )
    return kind
