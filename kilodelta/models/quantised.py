"""Recognise packed and quantised checkpoints, by the names and types of their tensors.

Their numbers are codes that only the scales beside them turn into weights, so neither a delta nor
an export can take them for weights. Names as the tools write them: AutoGPTQ and AutoAWQ
(`qweight`), compressed-tensors (`weight_packed`), bitsandbytes (`SCB`, `absmax`), ModelOpt and
transformers' FP8 (`weight_scale`, `weight_scale_inv`), torchao (`_weight_qdata`).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from kilodelta.errors import InputError
from kilodelta.files.checkpoint import Checkpoint

_FORMATS: Mapping[str, str] = MappingProxyType(
    {
        "qweight": "GPTQ or AWQ",
        "weight_packed": "compressed-tensors",
        "weight_scale_inv": "fine-grained FP8",
        "weight_scale": "scaled FP8 or INT8",
        "SCB": "bitsandbytes INT8",
        "absmax": "bitsandbytes 4 bit",
        "_weight_qdata": "torchao",
    }
)
"""The last part of a tensor's name to the format that writes it."""

_SETTINGS = "hf_quant_config.json"


def evidence(checkpoint: Checkpoint) -> str | None:
    """Say by what a checkpoint is known to be quantised; None for one of plain tensors.

    Example:
        >>> evidence(Checkpoint.open("tests/golden/0.1.0/base.safetensors")) is None
        True
    """
    for name in checkpoint.names:
        dtype, last = checkpoint.info(name).dtype, name.rpartition(".")[2]
        if last in _FORMATS:
            return f"{name} is {_FORMATS[last]}"
        if dtype == "F4" or dtype.startswith(("F8_", "F6_")):  # F64 is a float
            return f"{name} is {dtype}"
    if checkpoint.path.is_dir() and (checkpoint.folder / _SETTINGS).is_file():
        return f"it has a {_SETTINGS}"
    return None


def refuse(checkpoint: Checkpoint) -> None:
    """Refuse a quantised checkpoint.

    Raises:
        InputError: naming the tensor or file that shows it.
    """
    sign = evidence(checkpoint)
    if sign is not None:
        raise refusal(str(checkpoint.path), sign)


def refusal(source: str, sign: str) -> InputError:
    """Return the error for a quantised model, known by `found`."""
    return InputError(
        f"{source} holds a quantised model: {sign}",
        fix="give the model before quantisation; the folder of a quantised one is taken by compress"
        " (as BASE), rebase, merge, export, verify, bundle and release",
    )
