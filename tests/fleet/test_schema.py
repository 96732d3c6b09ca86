"""Fleet files: what is read, and that everything else is refused by its field's name."""

from __future__ import annotations

import inspect
import os
import shutil
from pathlib import Path

import pytest

from kilodelta.device import bundle
from kilodelta.device.make.settings import settings_from
from kilodelta.errors import InputError
from kilodelta.fleet import Fleet, schema
from kilodelta.fleet.schema import read_fleet
from kilodelta.fleet.sources import file_digest
from tests.support import processes
from tests.support.processes import GOLDEN

pytest.importorskip("tomllib")
GOOD = """
version = 1
[base.mini]
path = "base"
[[fine-tunes]]
tuned = ["tuned/*"]
inputs = "inputs/{name}.txt"
compress = { budget = "12KB", steps = 4, lr = 1 }
[[fine-tunes]]
base = "mini"
deltas = ["ready/*.kd"]
[target.onnx16]
kind = "onnx"
dtype = "fp16"
[target.rtx]
kind = "tensorrt"
for = ["sm86"]
resources = { sm86 = 1 }
"""


ONNX16 = 'kind = "onnx"\ndtype = "fp16"'
ORIN = 'kind = "release"\nversion = 1\nbundle = { '


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("base", "tuned/b", "tuned/a", "inputs", "ready"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "ready" / "c.kd").touch()
    for name in "ab":
        (tmp_path / "inputs" / f"{name}.txt").touch()
    return tmp_path


def read(folder: Path, text: str) -> Fleet:
    (folder / "fleet.toml").write_text(text)
    return read_fleet(folder / "fleet.toml")


def test_a_fleet_is_read(folder: Path) -> None:
    (folder / "fleet.toml").write_text(GOOD)
    fleet = read_fleet(folder / "fleet.toml")
    assert [t.name for t in fleet.fine_tunes] == ["a", "b", "c"]
    assert fleet.fine_tunes[0].inputs == folder / "inputs" / "a.txt"
    assert fleet.fine_tunes[0].compress == {"budget": "12KB", "steps": 4, "lr": 1}
    assert fleet.fine_tunes[2].delta == folder / "ready" / "c.kd"
    assert {t.base for t in fleet.fine_tunes} == {"mini"}
    assert [(t.name, t.kind) for t in fleet.targets] == [("onnx16", "onnx"), ("rtx", "tensorrt")]
    assert fleet.targets[1].resources == {"sm86": 1}


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("version = 1", "version = 2", "version is 2, not 1"),
        ("version = 1", "version = true", "version is True"),
        ("version = 1", "", "version is missing"),
        ("version = 1", "version = 1\nname = 'x'", "name is no field"),
        ('path = "base"', 'path = "none"', r"base\.mini\.path: .*none is missing"),
        ('path = "base"', 'path = "base"\nx = 1', r"base\.mini\.x is no field"),
        ("[base.mini]", "[base.'mini/x']", "is no name"),
        ('"tuned/*"', '"nothing/*"', r"fine-tunes\[0\]\.tuned: 'nothing/\*' matches nothing"),
        ('tuned = ["tuned/*"]', "", r"fine-tunes\[0\] needs either"),
        ('tuned = ["tuned/*"]', 'tuned = ["tuned/*"]\ndeltas = ["ready/*"]', "needs either"),
        ('tuned = ["tuned/*"]', "tuned = [1]", r"tuned is not a list of texts"),
        ('tuned = ["tuned/*"]', 'tuned = "tuned/*"', r"tuned is 'tuned/\*', not a list of texts"),
        ("{name}.txt", "{name}.no", r"fine-tunes\[0\]\.inputs: .*a\.no is missing"),
        ("steps = 4", "step = 4", r"fine-tunes\[0\]\.compress\.step is no field"),
        ("steps = 4", "steps = 4.5", r"compress\.steps is 4\.5, not a whole number"),
        ("steps = 4", "steps = true", r"compress\.steps is True"),
        ('"12KB"', '"12QB"', r"fine-tunes\[0\]\.compress: .*12QB"),
        ("steps = 4", "steps = 0", r"fine-tunes\[0\]\.compress: steps is 0"),
        ("lr = 1", "lr = nan", r"fine-tunes\[0\]\.compress: rate is nan"),
        ("lr = 1", "bits = 5", r"fine-tunes\[0\]\.compress: .*5 bits"),
        ('budget = "12KB"', "method = 'magic'", r"\.compress: 'magic' is no method"),
        ('budget = "12KB"', "method = 'nola', rank = 0", r"\.compress: rank is 0"),
        ("lr = 1", "method = 'magic'", r"fine-tunes\[0\]\.compress: 'magic' is no method"),
        ('["ready/*.kd"]', "[]", r"fine-tunes\[1\]\.deltas is an empty list"),
        (ONNX16, "kind = 'peft'\nsvd = 0", r"target\.onnx16\.svd is 0, not a whole number"),
        (ONNX16, "kind = 'release'\nversion = -1", r"target\.onnx16\.version is -1"),
        (ONNX16, f"{ORIN}mode = 'adapter', rank = 0 }}", r"onnx16\.bundle: --rank is 0"),
        (ONNX16, f"{ORIN}mode = 'adapter', slots = -3 }}", r"onnx16\.bundle: --slots is -3"),
        (ONNX16, f"{ORIN}mode = 'patch', slots = 2 }}", r"onnx16\.bundle: patch mode computes"),
        (ONNX16, f"{ORIN}mode = 'adapter', provider = 'x' }}", r"bundle: --provider is 'x'"),
        (ONNX16, f"{ORIN}mode = 'adapter', flavour = 'x' }}", r"bundle: --flavour is 'x'"),
        (ONNX16, f"{ORIN}mode = 'adapter', profile = ['x'] }}", r"bundle: 'x' is no profile"),
        (ONNX16, f"{ORIN}rank = 8 }}", r"onnx16\.bundle\.mode is missing: one of adapter"),
        ('kind = "onnx"', "", r"target\.onnx16\.kind is missing: one of merge"),
        ("resources = { sm86 = 1 }", "resources = { '' = 1 }", "a resource without a name"),
        ("[target.onnx16]", "[target.delta]", "compressed files lie under that name"),
        (
            'path = "base"',
            'path = "base"\nmodel = "nope"',
            r"base\.mini\.model is 'nope', not",
        ),
        ('base = "mini"', 'base = "other"', r"fine-tunes\[1\]\.base is 'other'"),
        ('deltas = ["ready/*.kd"]', 'deltas = ["ready/*.kd"]\ncompress = {}', "for tuned models"),
        ('kind = "onnx"', 'kind = "onx"', r"target\.onnx16\.kind is 'onx', not one of merge"),
        ('kind = "onnx"', 'kind = "onnx"\nfor = ["sm86"]', r"target\.onnx16\.for is no field"),
        ('for = ["sm86"]', "", r"target\.rtx\.for is missing"),
        ('for = ["sm86"]', 'for = ["86"]', r"target\.rtx\.for names '86', which is not like sm86"),
        ('dtype = "fp16"', 'dtype = "int8"', r"target\.onnx16\.dtype is 'int8', not one of fp32"),
        ('dtype = "fp16"', 'dtype = "float16"', r"target\.onnx16\.dtype is 'float16', not one"),
        ("sm86 = 1", "sm86 = 0", r"target\.rtx\.resources\.sm86 is 0, no positive"),
        ("[target.rtx]", "[target.rtx", "is no TOML"),
        (
            'kind = "onnx"\ndtype = "fp16"',
            f"{ORIN}mode = 'patched' }}",
            "bundle: --mode is 'patched'",
        ),
        (
            'kind = "onnx"\ndtype = "fp16"',
            f"{ORIN}mode = 'patch', keep = 1 }}",
            "bundle.keep is no field",
        ),
        ('kind = "onnx"\ndtype = "fp16"', f"{ORIN}engine = ['sm86'] }}", "bundle.mode is missing"),
        (
            'kind = "onnx"\ndtype = "fp16"',
            f"{ORIN}mode = 'patch', engine = ['orin'] }}",
            "bundle.engine names 'orin'",
        ),
        (
            'kind = "onnx"\ndtype = "fp16"',
            f"{ORIN}mode = 'patch', dtype = 'fp8' }}",
            "bundle: --dtype is 'fp8'",
        ),
        (
            'kind = "onnx"\ndtype = "fp16"',
            f"{ORIN}mode = 'patch', blocks = 'rows' }}",
            "bundle: 'rows' is no form of blocks; give auto, qdq, matmulnbits",
        ),
    ],
)
def test_faults_are_named(folder: Path, old: str, new: str, words: str) -> None:
    assert old in GOOD
    with pytest.raises(InputError, match=words):
        read(folder, GOOD.replace(old, new, 1))


def test_a_fleet_that_makes_nothing(folder: Path) -> None:
    """Deltas alone give nothing without a target; tuned models give deltas."""
    no_targets = GOOD.partition("[target.")[0]
    assert read(folder, no_targets).targets == ()
    tuned = no_targets[no_targets.index("[[fine") : no_targets.rindex("[[fine")]
    with pytest.raises(InputError, match=r"there is no \[target\.NAME\], and nothing to compress"):
        read(folder, no_targets.replace(tuned, ""))


def test_two_fine_tunes_of_one_name(folder: Path) -> None:
    (folder / "ready" / "a.kd").touch()
    with pytest.raises(InputError, match=r"two fine-tunes are called 'a': .*tuned/a and .*a\.kd"):
        read(folder, GOOD)


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_fleet(tmp_path / "none.toml")
    (tmp_path / "big.toml").write_text("#" * (2 << 20))
    with pytest.raises(InputError, match="more than 1048576 bytes"):
        read_fleet(tmp_path / "big.toml")
    for odd in (b"\xff", b"a = " + b"[" * 100_000, b"a = " + b"9" * 10_000):
        (tmp_path / "odd.toml").write_bytes(odd)
        with pytest.raises(InputError, match="is no TOML"):
            read_fleet(tmp_path / "odd.toml")
    os.mkfifo(tmp_path / "pipe.toml")
    for place in (tmp_path / "pipe.toml", Path("/dev/zero"), tmp_path, Path("a\0b.toml")):
        with pytest.raises(InputError, match="cannot be read"):
            read_fleet(place)


def test_an_input_that_is_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "texts.jsonl")
    with pytest.raises(InputError, match=r"texts\.jsonl cannot be read: is a pipe"):
        file_digest(tmp_path / "texts.jsonl")


def test_a_release_says_how_its_folder_holds_codes(folder: Path) -> None:
    """As `kilodelta bundle` takes it: each option of a bundle here is a parameter of `bundle`."""
    table = f"{ORIN}mode = 'patch', blocks = 'qdq' }}"
    target = read(folder, GOOD.replace('kind = "onnx"\ndtype = "fp16"', table, 1)).targets[0]
    assert target.options["bundle"] == {"mode": "patch", "blocks": "qdq"}
    assert set(schema.BUNDLE) <= set(inspect.signature(bundle).parameters)


def test_what_a_file_leaves_out_is_checked_as_bundle_fills_it_in() -> None:
    """A fleet checks by `settings_from`, and its tasks call `bundle`: their defaults are one."""
    ours, theirs = (inspect.signature(f).parameters for f in (settings_from, bundle))
    assert {name: p.default for name, p in ours.items()} == {n: theirs[n].default for n in ours}


def test_a_plan_needs_no_kernels(tmp_path: Path) -> None:
    """Loading numba takes longer than planning a hundred fine-tunes, and no task begins before."""
    shutil.copy(GOLDEN / "base.safetensors", tmp_path)
    shutil.copy(GOLDEN / "nola-8.kd", tmp_path)
    (tmp_path / "fleet.toml").write_text(
        "version = 1\n[base.one]\npath = 'base.safetensors'\n[[fine-tunes]]\n"
        "deltas = ['*.kd']\n[target.merged]\nkind = 'merge'\n"
    )
    out = processes.run(
        "import sys\nfrom kilodelta.fleet import local, make_plan, read_fleet\n"
        f"fleet = read_fleet({str(tmp_path / 'fleet.toml')!r})\n"
        f"plan = make_plan(fleet, {str(tmp_path / 'out')!r})\n"
        "print(len(plan.tasks), {'numba', 'torch', 'scipy'} & set(sys.modules))"
    )
    assert out == "1 set()\n"
