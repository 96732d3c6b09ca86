"""What a compression holds in memory, and what it says before memory is short."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
from torch import Tensor, nn

from kilodelta import memory
from kilodelta.compress import Options, Report, compress, plan
from kilodelta.compress.distill import placement as placing
from kilodelta.compress.distill.learn import late_head
from kilodelta.compress.distill.learn.outputs import Wanted
from kilodelta.compress.distill.learn.rows import to_rows
from kilodelta.compress.distill.learn.survey import survey
from kilodelta.compress.distill.pair import open_pair
from kilodelta.compress.distill.placement import Placement, require_weights_fit
from kilodelta.compress.distill.planning import estimate as estimating
from kilodelta.compress.distill.planning import room
from kilodelta.compress.distill.planning.memory import counting_kept
from kilodelta.compress.distill.teacher import ask as asking
from kilodelta.compress.distill.teacher.ask import batch_rows
from kilodelta.compress.distill.teacher.swap import as_tuned
from kilodelta.compress.training import train
from kilodelta.compress.training.activations import blocks_of, checkpointed
from kilodelta.errors import InputError
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.memory import resident
from kilodelta.models import open_model
from kilodelta.models.weights import tensor
from tests.support import pico

CPU = torch.device("cpu")
SMAPS = Path("/proc/self/smaps")
IDS = torch.arange(4 * 20).view(4, 20) % pico.VOCABULARY


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    base = pico.llama(tmp_path / "base")
    return base, pico.tuned(base, tmp_path / "tuned", size=0.3)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    return pico.texts(tmp_path / "texts.txt", 32)


def make(models: tuple[Path, Path], texts: Path, out: Path, **options: Any) -> Report:
    usual = {"steps": 4, "batch": 8, "held_out": 8, "budget": 3000, "dtype": "fp32"}
    chosen = Options(**{**usual, **options})  # auto would be what this processor is fast in
    return compress(*models, out, inputs=texts, options=chosen)


def resident_of_file(folder: Path) -> int:
    """Bytes of a model's file that this process holds in memory."""
    found, counts = 0, False
    for line in SMAPS.read_text().splitlines():
        if "-" in line.split()[0]:
            counts = line.endswith(str(folder / "model.safetensors"))
        elif counts and line.startswith("Rss:"):
            found += int(line.split()[1]) * 1024
    return found


def gradients(module: nn.Module) -> tuple[dict[str, Tensor], int]:
    """Gradients of a step by name, and the bytes that its forward pass kept."""
    module.zero_grad()
    with counting_kept(module) as kept:
        loss = module(input_ids=IDS).logits.float().square().mean()
    loss.backward()
    found = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    return found, kept.nbytes


def recorded_needs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Note how many bytes each trial step is found to need."""
    needs: list[int] = []
    measured = room._needed

    def needed(*args: Any) -> int:
        needs.append(measured(*args))
        return needs[-1]

    monkeypatch.setattr(room, "_needed", needed)
    return needs


@pytest.mark.parametrize("method", [train.Nola(rank=2, bases=8), train.Lora(rank=2)])
def test_checkpointed_activations_have_the_same_gradient(
    models: tuple[Path, Path], method: Any
) -> None:
    module = open_model(models[0]).module
    train.attach(module, method, "*proj.weight", seed=1, extras="model.norm.weight")
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    whole, bytes_whole = gradients(module)
    with checkpointed(module):
        again, bytes_again = gradients(module)
    assert whole.keys() == again.keys()
    for name, gradient in whole.items():
        assert torch.equal(gradient, again[name]), name
    assert bytes_again < 0.5 * bytes_whole
    assert gradients(module)[1] == bytes_whole  # as before once the block has ended


def test_blocks_are_found_and_what_has_none_is_refused(models: tuple[Path, Path]) -> None:
    assert len(blocks_of(open_model(models[0]).module)) == 2
    with (
        pytest.raises(InputError, match="Linear has no list of blocks"),
        checkpointed(nn.Linear(2, 3)),
    ):
        pass


def test_a_compression_with_checkpoints_makes_the_same_file(
    models: tuple[Path, Path], texts: Path, tmp_path: Path
) -> None:
    make(models, texts, tmp_path / "a.kd")
    make(models, texts, tmp_path / "b.kd", gradient_checkpointing=True)
    assert (tmp_path / "a.kd").read_bytes() == (tmp_path / "b.kd").read_bytes()


def test_the_tuned_model_takes_the_base_s_place_without_a_copy(models: tuple[Path, Path]) -> None:
    pair = open_pair(*models, model=None, learns=True, device="cpu", dtype="fp32")
    assert pair.student is not None
    from kilodelta.compress.distill.changes.compare import compare

    changes = compare(pair.base, pair.tuned)
    state = pair.student.module.state_dict
    with as_tuned(pair, changes) as teacher:
        for name, place in teacher.names.items():
            assert torch.equal(state()[place], tensor(pair.tuned, name)), name
    for name, place in pair.student.names.items():
        assert torch.equal(state()[place], tensor(pair.base, name)), name
        mapped = pair.student.mapped.tensor(name) if pair.student.mapped else None
        assert mapped is not None
        assert state()[place].data_ptr() == mapped.data_ptr(), name


@pytest.mark.skipif(not SMAPS.exists(), reason="the system does not say what of a file is resident")
def test_a_base_that_is_copied_leaves_no_pages_of_its_file_resident(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    base = tmp_path / "base"
    sizes = {"vocab_size": 8192, "hidden_size": 128, "intermediate_size": 256}
    config = LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=4)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(base)
    before = resident_of_file(base)
    opened = open_model(base, dtype=torch.float32, mapped=True)
    size = (base / "model.safetensors").stat().st_size
    assert size > 2_000_000
    assert before == 0
    # The pages at a tensor's ends stay, as its neighbours' bytes may lie in them.
    assert 0 < resident_of_file(base) < 0.2 * size
    checkpoint = Checkpoint.open(base)
    for name, place in opened.names.items():
        assert torch.equal(opened.module.state_dict()[place], tensor(checkpoint, name).float())


def test_rows_without_a_mask_are_as_long_as_their_outputs_are(
    models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = open_model(models[0])
    bare, whole = {"input_ids": IDS}, {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    for batch in (bare, whole):
        rows = to_rows([batch], 0)
        seen = survey(loaded, rows, Wanted())
        assert seen.cells == 20 * pico.VOCABULARY
        monkeypatch.setattr(asking, "CELLS", 3 * 20 * pico.VOCABULARY + 1)
        assert batch_rows(rows, seen) == 3


def test_smaller_pieces_of_logits_and_less_free_memory_make_the_same_file(
    models: tuple[Path, Path], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("ROOM", 100), ("TOP_K", 8)):  # as a large vocabulary would be
        monkeypatch.setattr(asking, name, value)
    files = []
    for cells in (1 << 22, 300):
        monkeypatch.setattr(late_head, "CELLS", cells)
        make(models, texts, tmp_path / f"{cells}.kd")
        monkeypatch.setattr(asking, "CHUNK", 300)
        monkeypatch.setattr(memory, "_trim", lambda: None)
        files.append((tmp_path / f"{cells}.kd").read_bytes())
    assert files[0] == files[1]


def test_free_memory_goes_back_to_the_system() -> None:
    if memory._trim() is None:
        pytest.skip("the C library keeps what is free")
    kept = [bytearray(60_000) for _ in range(1000)]  # below what malloc maps by itself
    pin = bytearray(60_000)
    held = resident()
    del kept
    memory.give_back()
    assert held - resident() > 40_000_000
    assert len(pin) == 60_000


def test_garbage_is_collected_where_the_process_has_grown(monkeypatch: pytest.MonkeyPatch) -> None:
    """A collection takes a second where many libraries are loaded; most calls have none to do."""
    held, times = [1 << 30], []
    monkeypatch.setattr(memory, "_after_collection", 1 << 30)
    monkeypatch.setattr(memory, "resident", lambda: held[-1])
    monkeypatch.setattr(gc, "collect", lambda: times.append(held[-1]))
    for grown in (0, memory.GROWN - 1, memory.GROWN, memory.GROWN, 2 * memory.GROWN):
        held.append((1 << 30) + grown)
        memory.give_back()
    assert times == [(1 << 30) + memory.GROWN, (1 << 30) + 2 * memory.GROWN]
    held.append(0)  # a system that does not say
    memory.give_back()
    assert times[-1] == 0


def test_nothing_is_collected_while_libraries_are_loaded() -> None:
    with memory.uncollected():
        assert not gc.isenabled()
        with memory.uncollected():
            pass
        assert not gc.isenabled()  # the outer one goes on
    assert gc.isenabled()


def test_freed_memory_is_kept_within_a_block_and_given_back_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[int, ...]] = []

    def options(*given: int) -> int:
        asked.append(given)
        return 1

    monkeypatch.setattr(memory, "_options", lambda: options)
    monkeypatch.setattr(memory, "_trim", lambda: lambda pad: asked.append((pad,)))
    with memory.kept():
        assert asked == [(-3, 32 << 20), (-1, memory.KEPT)]
    assert asked[2:] == [(-1, 64 << 20), (0,)]
    monkeypatch.setattr(memory, "_options", lambda: None)
    with memory.kept():  # another C library
        pass
    assert len(asked) == 4


def test_large_blocks_are_mapped_apart_where_memory_is_short(
    models: tuple[Path, Path], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, ...]] = []
    real = memory._options() or (lambda *given: 1)

    def options(*given: int) -> Any:
        asked.append(given)
        return real(*given)

    monkeypatch.setattr(memory, "_options", lambda: options)
    needs = recorded_needs(monkeypatch)
    make(models, texts, tmp_path / "a.kd")
    assert not asked
    one, two = needs
    monkeypatch.setattr(room, "available", lambda device: one + 11 * (two - one) + 7)
    tight = make(models, texts, tmp_path / "b.kd")  # 12 rows fit, and a batch has 8
    assert asked == [(-3, memory.APART), (-3, 32 << 20)]
    assert not any("memory is short" in warning for warning in tight.warnings)
    assert (tmp_path / "a.kd").read_bytes() == (tmp_path / "b.kd").read_bytes()


def test_weights_that_do_not_fit_are_refused_before_they_are_loaded(
    models: tuple[Path, Path], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placing, "available", lambda device: 10)
    base = Checkpoint.open(models[0])
    require_weights_fit(base, Placement(device=CPU, dtype=torch.float32))  # mapped: no copy
    with pytest.raises(InputError, match="KB in bf16, and 10 B are free") as caught:
        make(models, texts, tmp_path / "a.kd", dtype="bf16")
    assert "--dtype fp32, the type of the files" in caught.value.fix
    with pytest.raises(InputError, match="KB in fp32") as caught:
        require_weights_fit(base, Placement(device=torch.device("cuda"), dtype=torch.float32))
    assert "--device cpu" in caught.value.fix


def test_a_batch_that_memory_does_not_hold_is_computed_in_pieces_from_the_start(
    models: tuple[Path, Path], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs = recorded_needs(monkeypatch)
    whole = make(models, texts, tmp_path / "a.kd")
    one, two = needs
    assert two - one > 20_000
    monkeypatch.setattr(room, "available", lambda device: one + 2 * (two - one) + 7)
    pieces = make(models, texts, tmp_path / "b.kd")
    assert any("memory is short: steps were computed 3 inputs" in w for w in pieces.warnings)
    assert whole.after is not None
    assert pieces.after is not None
    assert pieces.after.divergence == pytest.approx(whole.after.divergence, rel=1e-3)
    monkeypatch.setattr(room, "available", lambda device: one - 1)
    with pytest.raises(InputError, match=r"one input of \d+ tokens takes .*, and .* are free"):
        make(models, texts, tmp_path / "c.kd")
    assert not (tmp_path / "c.kd").exists()


def test_a_curve_that_memory_does_not_hold_is_refused_after_its_estimate(
    models: tuple[Path, Path], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(estimating, "available", lambda device: 0)
    monkeypatch.setattr(estimating, "resident", lambda: 1000)
    said: list[Any] = []
    with pytest.raises(InputError, match=r"a step may take .* at its peak, and .* are free"):
        plan(
            *models, inputs=texts, out=tmp_path / "out", curve="3KB,6KB",
            options=Options(steps=4, batch=8), announce=said.append,
        )  # fmt: skip
    assert len(said) == 1
    assert not (tmp_path / "out").exists()
