"""What cannot be imported: each a sentence that says what it is and what helps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import kilodelta
from kilodelta.cli import main
from kilodelta.compress.adapters import import_adapter
from kilodelta.errors import (
    BaseMismatchError,
    CheckpointError,
    InputError,
    KiloDeltaError,
    OutputError,
)
from tests.support import adapters, pico

pytestmark = pytest.mark.filterwarnings("ignore")


def lora(**options: Any) -> Any:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 8, **options})


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("plain")
    base = pico.bert(root / "base")
    return base, adapters.save(
        adapters.wrap(base, "bert", lora(target_modules=["query"])), root / "adapter"
    )


FILES: dict[str, tuple[str, str]] = {
    "lora.gguf": ("a GGUF file of llama.cpp", "the folder that PEFT's save_pretrained wrote"),
    "task.kd": ("a .kd file already", "kilodelta merge"),
    "model.onnx": ("an ONNX file", "the folder that PEFT's save_pretrained wrote"),
    "one.onnx_adapter": ("an adapter file of ONNX Runtime", "from which it was made"),
    "adapters.npz": ("an .npz file of arrays", "save_pretrained"),
    "adapter.zip": ("a ZIP archive", "save_pretrained"),
    "adapter_model.safetensors": ("one file of a PEFT adapter", "give its folder"),
    "adapter_config.json": ("one file of a PEFT adapter", "give its folder"),
    "pytorch_lora_weights.safetensors": ("a LoRA of Hugging Face diffusers", "fuse_lora"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_adapter_says_what_it_is(
    name: str, plain: tuple[Path, Path], tmp_path: Path
) -> None:
    heads = {".gguf": b"GGUF", ".zip": b"PK\x03\x04"}
    (tmp_path / name).write_bytes(heads.get(Path(name).suffix, b"\x08") + bytes(64))
    what, fix = FILES[name]
    with pytest.raises(InputError, match=f"is {what}") as error:
        import_adapter(tmp_path / name, plain[0], tmp_path / "out.kd")
    assert fix in error.value.fix


FOLDERS: dict[str, tuple[str, str]] = {
    "pytorch_lora_weights.safetensors": ("a LoRA of Hugging Face diffusers", "fuse_lora"),
    "adapters.safetensors": ("an adapter of MLX", "mlx_lm.fuse"),
    "adapter_model.pt": ("saved without PEFT's configuration", "save_pretrained"),
    "model.safetensors": ("a whole model, no adapter", "kilodelta compress BASE TUNED"),
    "model.safetensors.index.json": ("a whole model, no adapter", "kilodelta compress"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_is_no_adapter_says_what_it_is(
    name: str, plain: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / name).write_bytes(b"{}")
    what, fix = FOLDERS[name]
    with pytest.raises(InputError, match=what) as error:
        import_adapter(tmp_path / "folder", plain[0], tmp_path / "out.kd")
    assert fix in error.value.fix


@pytest.mark.parametrize("content", [b"", b"GGUF" + bytes(80), b"PK\x03\x04" + bytes(80)])
def test_a_checkpoint_of_any_bytes_is_a_sentence(
    content: bytes, plain: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "model.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot be read as weights: it "):
        import_adapter(tmp_path / "model.pth", plain[0], tmp_path / "out.kd", alpha=1)
    with pytest.raises(CheckpointError, match=r"nothing\.pt does not exist"):
        import_adapter(tmp_path / "nothing.pt", plain[0], tmp_path / "out.kd")


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"peft_type": "PROMPT_TUNING"}, "adds inputs to the model and changes no weight"),
        ({"peft_type": ["LORA"]}, "is not known here"),
        ({"peft_type": ...}, "has no peft_type"),
        ({"layer_replication": [[0, 2], [0, 2]]}, "repeats the base's layers"),
        ({"kasa_config": {"beta": 1}}, "KaSA cuts singular values off"),
        ({"arrow_config": {"a": 1}}, "arrow_config is .* not known here"),
    ],
)
def test_a_kind_of_adapter_that_has_no_delta(
    settings: dict[str, Any], text: str, plain: tuple[Path, Path], tmp_path: Path
) -> None:
    shutil.copytree(plain[1], tmp_path / "copy")
    adapters.edit(tmp_path / "copy", **settings)
    with pytest.raises(InputError, match=text):
        import_adapter(tmp_path / "copy", plain[0], tmp_path / "out.kd")


def test_settings_of_other_methods_are_looked_at(tmp_path: Path) -> None:
    base = pico.bert(tmp_path / "base")
    config = peft.VeraConfig(r=4, target_modules=["query"])
    folder = adapters.save(adapters.wrap(base, "bert", config), tmp_path / "adapter")
    adapters.edit(folder, use_some_new_thing=3)
    with pytest.raises(InputError, match="use_some_new_thing is 3, and it is not known here"):
        import_adapter(folder, base, tmp_path / "out.kd")


QUANTISED: dict[str, Any] = {
    "F8_E4M3": lambda value: value.to(torch.float8_e4m3fn),
    "I8": lambda value: (value * 100).to(torch.int8),
    "U8": lambda value: torch.zeros(value.numel() // 2, 1, dtype=torch.uint8),
    "F64": lambda value: value.double(),
}


@pytest.mark.parametrize("dtype", QUANTISED)
def test_a_quantised_base_is_named_by_tensor_and_type(
    dtype: str, plain: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = plain
    tensors = load_file(base / "model.safetensors")
    name = "encoder.layer.1.attention.self.query.weight"
    tensors[name] = QUANTISED[dtype](tensors[name])
    save_file(tensors, tmp_path / "base.safetensors")
    with pytest.raises(InputError, match=rf"holds {name}, which .* as {dtype} ") as error:
        import_adapter(adapter, tmp_path / "base.safetensors", tmp_path / "out.kd")
    assert "before quantisation" in error.value.fix


def test_a_packed_base_is_named_by_what_it_holds_instead(
    plain: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = plain
    tensors = {
        name.replace("query.weight", "query.qweight"): tensor
        for name, tensor in load_file(base / "model.safetensors").items()
    }
    save_file(tensors, tmp_path / "base.safetensors")
    with pytest.raises(BaseMismatchError, match=r"but encoder\.layer\.0.*query\.qweight"):
        import_adapter(adapter, tmp_path / "base.safetensors", tmp_path / "out.kd")


@pytest.mark.parametrize(
    "layer",
    [
        torch.nn.Conv2d(8, 12, 3, groups=2),
        torch.nn.Conv2d(8, 12, 3, groups=4),
        torch.nn.Conv1d(8, 8, 4, groups=8),
    ],
    ids=lambda layer: f"groups-{layer.groups}",
)
def test_a_grouped_convolution_is_named(layer: Any, tmp_path: Path) -> None:
    net = torch.nn.Sequential(layer, torch.nn.ReLU())
    save_file(net.state_dict(), tmp_path / "base.safetensors")
    wrapped = adapters.adapted(net, lora(r=layer.groups, target_modules=["0"]))
    folder = adapters.save(wrapped, tmp_path / "adapter")
    with pytest.raises(InputError, match=r"0\.weight .* is a grouped convolution"):
        import_adapter(folder, tmp_path / "base.safetensors", tmp_path / "out.kd")


@pytest.mark.parametrize(
    "layer",
    [torch.nn.Conv1d(8, 12, 3), torch.nn.Conv2d(8, 12, (2, 3)), torch.nn.Conv3d(4, 6, 2)],
    ids=lambda layer: type(layer).__name__,
)
def test_other_convolutions_are_merged_as_peft_does(layer: Any, tmp_path: Path) -> None:
    net = torch.nn.Sequential(layer, torch.nn.ReLU())
    save_file(net.state_dict(), tmp_path / "base.safetensors")
    wrapped = adapters.adapted(net, lora(target_modules=["0"]))
    folder = adapters.save(wrapped, tmp_path / "adapter")
    import_adapter(folder, tmp_path / "base.safetensors", tmp_path / "out.kd", bits=16)
    kilodelta.merge(
        tmp_path / "base.safetensors", tmp_path / "out.kd", tmp_path / "out.safetensors"
    )
    ours = load_file(tmp_path / "out.safetensors")["0.weight"]
    theirs = wrapped.merge_and_unload().state_dict()["0.weight"]
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_multihead_attention_is_named(tmp_path: Path) -> None:
    net = torch.nn.Module()
    net.attn = torch.nn.MultiheadAttention(16, 2)
    save_file(net.state_dict(), tmp_path / "base.safetensors")
    wrapped = adapters.adapted(net, lora(target_modules=["attn"]))
    folder = adapters.save(wrapped, tmp_path / "adapter")
    with pytest.raises(BaseMismatchError, match="a MultiheadAttention of torch") as error:
        import_adapter(folder, tmp_path / "base.safetensors", tmp_path / "out.kd")
    assert "merge_and_unload" in error.value.fix


EMPTIES: dict[str, Any] = {
    "empty": lambda tensors, key: tensors.update({key: torch.empty(0)}),
    "all-empty": lambda tensors, key: tensors.update({n: torch.empty(0) for n in tensors}),
    "half": lambda tensors, key: tensors.update({key: tensors[key][:8].clone()}),
    "scalar": lambda tensors, key: tensors.update({key: torch.tensor(1.0)}),
}


@pytest.mark.parametrize("case", EMPTIES)
def test_factors_that_were_not_gathered_are_named(
    case: str, plain: tuple[Path, Path], tmp_path: Path
) -> None:
    """DeepSpeed ZeRO-3 and FSDP save empty or cut tensors where nobody gathers them."""
    key = "base_model.model.encoder.layer.1.attention.self.query.lora_B.weight"
    shutil.copytree(plain[1], tmp_path / "copy")
    adapters.edit(tmp_path / "copy", lambda tensors: EMPTIES[case](tensors, key))
    with pytest.raises(KiloDeltaError, match=r"query\.lora_[AB]\.weight has shape") as error:
        import_adapter(tmp_path / "copy", plain[0], tmp_path / "out.kd")
    assert ("ZeRO-3" in error.value.fix) is (case != "half")


def test_an_output_is_replaced_only_when_asked(plain: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = plain
    out = tmp_path / "task.kd"
    out.write_bytes(b"precious")
    with pytest.raises(OutputError, match="exists already") as error:
        import_adapter(adapter, base, out)
    assert "--force" in error.value.fix
    assert out.read_bytes() == b"precious"
    arguments = ["import", adapter, "--base", base, "-o", out, "--force", "-q", "--json"]
    done = CliRunner().invoke(main, [*map(str, arguments)])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["targets"] == 2
    assert kilodelta.inspect(out).targets["count"] == 2


@pytest.mark.parametrize("requantise", [False, True])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", ""])
def test_files_of_the_base_are_never_replaced(
    name: str, requantise: bool, tmp_path: Path, plain: tuple[Path, Path]
) -> None:
    base = Path(shutil.copytree(plain[0], tmp_path / "base"))
    before = {path: path.read_bytes() for path in base.iterdir()}
    with pytest.raises(OutputError, match=r"belongs to the base .* never written|is a folder"):
        import_adapter(plain[1], base, base / name, force=True, requantise=requantise)
    link = tmp_path / "link"
    link.symlink_to(base)
    with pytest.raises(OutputError, match=r"belongs to the base .* never written|is a folder"):
        import_adapter(plain[1], base, link / name, force=True, requantise=requantise)
    assert {path: path.read_bytes() for path in base.iterdir()} == before


def test_an_earlier_file_in_the_base_s_folder_may_be_replaced(
    plain: tuple[Path, Path], tmp_path: Path
) -> None:
    base = Path(shutil.copytree(plain[0], tmp_path / "base"))
    import_adapter(plain[1], base, base / "task.kd")
    with pytest.raises(OutputError, match="exists already"):
        import_adapter(plain[1], base, base / "task.kd")
    import_adapter(plain[1], base, base / "task.kd", force=True)


def test_the_adapter_s_own_files_are_never_replaced(
    plain: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(OutputError, match="belongs to the adapter"):
        import_adapter(plain[1], plain[0], plain[1] / "adapter_model.safetensors", force=True)
