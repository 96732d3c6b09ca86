"""PEFT RandLora in: its basis bit for bit, its update and merge to float32 rounding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import peft.tuners.randlora.model as peft_model
import pytest
import torch
from safetensors.torch import load_file, save_file

import kilodelta
from kilodelta.compress.adapters.conversion import convert_adapter
from kilodelta.compress.adapters.reader import ReadOptions
from kilodelta.errors import CheckpointError, FileError, InputError, SelfTestError
from kilodelta.format.delta import Delta
from kilodelta.format.foreign import peft_randlora
from kilodelta.verify.digests.proof import prove
from tests.support import adapters, pico

KINDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "sparse": {"sparse": True},
    "very-sparse": {"very_sparse": True},
}


class Net(torch.nn.Module):
    """A tall, a wide and a square layer."""

    def __init__(self) -> None:
        super().__init__()
        self.tall = torch.nn.Linear(24, 40)
        self.wide = torch.nn.Linear(40, 16)
        self.square = torch.nn.Linear(16, 16)


def config(**options: Any) -> peft.RandLoraConfig:
    with adapters.quiet():
        return peft.RandLoraConfig(**{"r": 5, "randlora_alpha": 100, **options})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("key", [0, 2**33 + 7])
def test_the_basis_is_pefts_bit_for_bit(
    kind: str, dtype: str, key: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peft_model, "is_bf16_available", lambda: dtype == "bfloat16")
    options = {"target_modules": ["tall", "wide", "square"], "projection_prng_key": key}
    with adapters.quiet():
        model = peft.get_peft_model(Net(), config(**options, **KINDS[kind]))
    A, B = (getattr(model.base_model, f"randlora_{part}")["default"] for part in "AB")
    drawn = peft_randlora.draw(kind, dtype if kind == "dense" else "float32", key, 5, 40, 40)
    assert np.array_equal(drawn[0], A[:, 0].float().numpy())
    assert np.array_equal(drawn[1], B.float().numpy())


def scalar_update(form: Any, q: Any, basis: Any, out: int, in_: int) -> Any:
    """PEFT's formula as plain loops: B's columns base by base, L's rows rank by rank."""
    A, B = basis
    r, n, m = form.rank, len(q["gamma"]), min(out, in_)
    L = [
        [
            float(q["lambda"][rho, nu]) * float(A[rho, c]) * float(q["gamma"][nu, c])
            for c in range(m)
        ]
        for rho in range(r)
        for nu in range(n)
    ]
    found = np.zeros((out, in_))
    for i in range(max(out, in_)):
        columns = [float(B[i, nu, rho]) for nu in range(n) for rho in range(r)]
        for c in range(m):
            total = sum(columns[k] * L[k][c] for k in range(n * r))
            place = (i, c) if out >= in_ else (c, i)
            found[place] = form.alpha / form.rank * total
    return found


def bert_case(tmp_path: Path, **options: Any) -> tuple[Path, Any, Path]:
    base = pico.bert(tmp_path / "base")
    targets = {"target_modules": ["query", "intermediate.dense"]}
    model = adapters.wrap(base, "bert", config(**targets, **options))
    return base, model, adapters.save(model, tmp_path / "adapter")


def ulp_tolerance(delta: Delta, name: str) -> float:
    """How far PEFT's float32 update may lie from the exact one: K products of which each is rounded
    three times and each partial sum once, so (K + 3) 2^-24 of the sum of magnitudes."""
    compat, target, q = delta.manifest.compat, delta.target(name), delta.coefficients(name)
    assert compat is not None
    left = np.abs(compat.left(q, target, delta.stream, range(target.matrix[0])))
    right = np.abs(compat.right(q, target, delta.stream))
    top = float((left.astype(np.float64) @ right).max())
    return float((right.shape[0] + 3) * 2.0**-24 * top * compat.scaling)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("saved", [True, False])
def test_updates_equal_pefts(kind: str, saved: bool, tmp_path: Path) -> None:
    options = {**KINDS[kind], "save_projection": saved, "projection_prng_key": 11}
    base, model, folder = bert_case(tmp_path, **options)
    asked = ReadOptions(basis_dtype=None if saved or kind != "dense" else "bfloat16")
    done = convert_adapter(folder, base, tmp_path / "task.kd", options=asked)
    delta = kilodelta.load(tmp_path / "task.kd", base=base)
    assert done.method["basis"] == kind
    assert done.error < 1e-6
    found = adapters.updates(model)
    assert set(delta.targets) == {f"{path}.weight" for path in found}
    for path, update in found.items():
        ours, tolerance = delta.update(f"{path}.weight"), ulp_tolerance(delta, f"{path}.weight")
        assert np.abs(ours - update.numpy()).max() <= tolerance
    name = "encoder.layer.0.intermediate.dense.weight"
    form, q = delta.manifest.compat, delta.coefficients(name)
    basis = peft_randlora.draw(kind, done.method["dtype"], 11, 5, 16, 24)
    scalar = scalar_update(form, q, basis, 24, 16)
    assert np.abs(delta.update(name) - scalar).max() <= ulp_tolerance(delta, name)


def test_merging_equals_merge_and_unload(tmp_path: Path) -> None:
    base, model, folder = bert_case(tmp_path)
    convert_adapter(folder, base, tmp_path / "task.kd")
    kilodelta.merge(base, tmp_path / "task.kd", tmp_path / "out")
    delta = kilodelta.load(tmp_path / "task.kd", base=base)
    theirs = adapters.merged(model, tmp_path / "theirs")
    ours = load_file(tmp_path / "out" / "model.safetensors")
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        if name in delta.targets:
            # and the sum's own rounding on both sides
            tolerance = ulp_tolerance(delta, name) + float(tensor.abs().max()) * 2.0**-23
            assert (tensor - theirs[name]).abs().max() <= tolerance
        else:
            assert torch.equal(tensor, theirs[name])
    proof = prove(base, tmp_path / "task.kd", tmp_path / "out")
    assert proof.targets == 4


def test_conv1d_layers_are_transposed(tmp_path: Path) -> None:
    base = pico.gpt2(tmp_path / "base")
    options = {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True}
    model = adapters.wrap(base, "gpt2", config(**options))
    folder = adapters.save(model, tmp_path / "adapter")
    convert_adapter(folder, base, tmp_path / "task.kd")
    kilodelta.merge(base, tmp_path / "task.kd", tmp_path / "out")
    delta = kilodelta.load(tmp_path / "task.kd", base=base)
    theirs = adapters.merged(model, tmp_path / "theirs")
    ours = load_file(tmp_path / "out" / "model.safetensors")
    assert all(target.transposed for target in delta.targets.values())
    for name in delta.targets:
        tolerance = ulp_tolerance(delta, name) + float(ours[name].abs().max()) * 2.0**-23
        assert (ours[name] - theirs[name]).abs().max() <= tolerance


def test_heads_and_biases_travel_whole(tmp_path: Path) -> None:
    base = pico.bert_classifier(tmp_path / "base")
    options = {"target_modules": ["key", "output.dense"], "bias": "all"}
    model = adapters.wrap(
        base,
        "bert_classifier",
        config(**options, modules_to_save=["classifier"], task_type="SEQ_CLS"),
    )
    folder = adapters.save(model, tmp_path / "adapter")
    done = convert_adapter(folder, base, tmp_path / "task.kd")
    assert {"classifier.weight", "bert.encoder.layer.0.attention.self.key.bias"} <= set(done.extras)
    kilodelta.merge(base, tmp_path / "task.kd", tmp_path / "out")
    theirs = adapters.merged(model, tmp_path / "theirs")
    ours = load_file(tmp_path / "out" / "model.safetensors")
    delta = kilodelta.load(tmp_path / "task.kd", base=base)
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[n], theirs[n]) for n in ours if n not in delta.targets)


def test_a_type_that_nobody_says_is_asked_for(tmp_path: Path) -> None:
    base, _, folder = bert_case(tmp_path, save_projection=False)
    with pytest.raises(InputError, match="nothing says in which type") as error:
        convert_adapter(folder, base, tmp_path / "task.kd")
    assert "--basis-dtype bfloat16" in error.value.fix
    assert not (tmp_path / "task.kd").exists()
    convert_adapter(folder, base, tmp_path / "half.kd", options=ReadOptions(basis_dtype="float16"))
    convert_adapter(
        folder, base, tmp_path / "brain.kd", options=ReadOptions(basis_dtype="bfloat16")
    )
    first, second = (
        kilodelta.load(tmp_path / f"{name}.kd", base=base) for name in ("half", "brain")
    )
    name = next(iter(first.targets))
    assert np.abs(first.update(name) - second.update(name)).max() > 0.01


def test_a_basis_of_unknown_origin_is_stored_whole(tmp_path: Path) -> None:
    base, model, folder = bert_case(tmp_path)
    with torch.no_grad():
        model.base_model.randlora_B["default"].mul_(0.5)
    adapters.save(model, folder)
    done = convert_adapter(folder, base, tmp_path / "task.kd")
    assert done.method["basis"] == "stored"
    delta = kilodelta.load(tmp_path / "task.kd", base=base)
    for path, update in adapters.updates(model).items():
        tolerance = ulp_tolerance(delta, f"{path}.weight")
        assert np.abs(delta.update(f"{path}.weight") - update.numpy()).max() <= tolerance
    assert prove(base, tmp_path / "task.kd").targets == 4


def test_half_the_bytes_on_request_with_the_error_measured(tmp_path: Path) -> None:
    base, _, folder = bert_case(tmp_path)
    wide = convert_adapter(folder, base, tmp_path / "wide.kd")
    half = convert_adapter(folder, base, tmp_path / "half.kd", options=ReadOptions(dtype="float16"))
    assert half.nbytes["coefficients"] * 2 == wide.nbytes["coefficients"]
    # two float16 coefficients in each product, each off by at most 2^-11
    assert 1e-5 < half.error < 2 * 2.0**-11
    assert prove(base, tmp_path / "half.kd").targets == 4


def test_a_wrong_fingerprint_is_refused(tmp_path: Path) -> None:
    from tests.support.making import reforged

    base, _, folder = bert_case(tmp_path)
    convert_adapter(folder, base, tmp_path / "task.kd")
    source = kilodelta.load(tmp_path / "task.kd")
    place = reforged(
        tmp_path / "forged.kd",
        source,
        lambda table: table["method"].update(fingerprint="sha256:" + "0" * 64),
    )
    with pytest.raises(SelfTestError, match="comes out here with SHA-256"):
        prove(base, place)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda m: m.update(basis="thick"), "method.basis is 'thick'"),
        (lambda m: m.update(dtype="float64"), "method.dtype is 'float64'"),
        (lambda m: m.update(alpha="640"), "method.alpha is '640'"),
        (lambda m: m.update(small=0), "method.small is 0"),
        (lambda m: m.pop("large"), "method lacks 'large'"),
        (lambda m: m.update(seed=1), "method has an unknown key 'seed'"),
    ],
)
def test_a_hostile_manifest_is_refused(tmp_path: Path, change: Any, text: str) -> None:
    from tests.support.making import reforged

    base, _, folder = bert_case(tmp_path)
    convert_adapter(folder, base, tmp_path / "task.kd")
    source = kilodelta.load(tmp_path / "task.kd")
    place = reforged(tmp_path / "forged.kd", source, lambda table: change(table["method"]))
    with pytest.raises(FileError, match=text):
        kilodelta.load(place)


def rewrite(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


LAMBDA = "base_model.model.encoder.layer.1.attention.self.query.randlora_lambda"


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda t: t.pop(LAMBDA), CheckpointError, f"no tensor '{LAMBDA}'"),
        (
            lambda t: t.update({LAMBDA: torch.zeros(4, 4)}),
            InputError,
            rf"{LAMBDA} has shape \(4, 4\)",
        ),
        (lambda t: t[LAMBDA].fill_(float("nan")), InputError, f"{LAMBDA} holds NaN"),
        (
            lambda t: t["base_model.randlora_A"].mul_(2),
            CheckpointError,
            "differs from base_model.randlora_A",
        ),
        (
            lambda t: t.update({LAMBDA.replace("randlora_lambda", "lora_A.weight"): torch.ones(1)}),
            CheckpointError,
            "belongs to another method than RANDLORA",
        ),
    ],
)
def test_a_broken_adapter_is_refused(tmp_path: Path, change: Any, error: Any, text: str) -> None:
    base, _, folder = bert_case(tmp_path)
    rewrite(folder, change)
    with pytest.raises(error, match=text):
        convert_adapter(folder, base, tmp_path / "task.kd")
    assert not (tmp_path / "task.kd").exists()


def test_another_rank_than_the_configurations_is_refused(tmp_path: Path) -> None:
    base, _, folder = bert_case(tmp_path)
    table = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**table, "r": 4}))
    with pytest.raises(InputError, match=r"randlora_lambda has shape \(5, 4\)"):
        convert_adapter(folder, base, tmp_path / "task.kd")


def test_exact_only_functions_say_why_not(tmp_path: Path) -> None:
    base, _, folder = bert_case(tmp_path)
    convert_adapter(folder, base, tmp_path / "task.kd")
    delta = kilodelta.load(tmp_path / "task.kd", base=base)
    with pytest.raises(InputError, match="peft-randlora is a compatibility form") as error:
        delta.expand(next(iter(delta.targets)))
    assert "--requantise" in error.value.fix
    assert not kilodelta.inspect(tmp_path / "task.kd").exact
