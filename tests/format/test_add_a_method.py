"""docs/add_a_method.md, executed: its files and its line make a method that all rooms know."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kilodelta.errors import InputError
from kilodelta.format import methods
from kilodelta.format.methods import METHODS, register
from tests.support.processes import ROOT

pytest.importorskip("torch")

PAGE = (ROOT / "docs" / "add_a_method.md").read_text()
BLOCKS = re.findall(r"^```(?:python)?\n(.*?)^```$", PAGE, flags=re.S | re.M)
FILES = {
    block.splitlines()[0].removeprefix("# file: "): block
    for block in BLOCKS
    if block.startswith("# file: ")
}
(LINE,) = (block for block in BLOCKS if block.startswith('    "core": '))
(RUN,) = (block for block in BLOCKS if block.startswith("# run"))


def overlay(place: Path) -> Path:
    """A tree in which everything is the repository's, but for what the page adds."""
    source = ROOT / "kilodelta"
    for depth in (Path(), Path("format"), Path("format", "methods")):
        (place / "kilodelta" / depth).mkdir(parents=True, exist_ok=True)
        for path in (source / depth).iterdir():
            new = place / "kilodelta" / depth / path.name
            if path.name not in ("__pycache__", "format", "methods"):
                new.symlink_to(path.resolve())
    table = place / "kilodelta" / "format" / "methods" / "__init__.py"
    text, last = (
        table.read_text(),
        '    "unilora": "kilodelta.format.methods.unilora.spec:UniLora",\n',
    )
    assert last in text
    table.unlink()
    table.write_text(text.replace(last, last + LINE))
    for name, content in FILES.items():
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text(content)
    return place


def run(code: str, folder: Path, *paths: Path) -> None:
    """Run code in a folder, where modules come from it and from these paths."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))},
    )
    assert done.returncode == 0, done.stderr[-4000:]


EVERYWHERE = """
import numpy as np, torch
from pathlib import Path
from click.testing import CliRunner
import kilodelta
from kilodelta.cli import main
from kilodelta.compress.distill import budget
from kilodelta.export.adapter.factors import expand
from kilodelta.export.adapter.layout import AdapterLayout, Exposed
from kilodelta.export.peft.factors import exact_pair
from kilodelta.format.methods import METHODS
from kilodelta.merging import cpu, stacks
from kilodelta.merging.gpu import stream
from kilodelta.merging.gpu.choose import unit_for
from kilodelta.merging.gpu.selftest import require_good_unit
from kilodelta.verify.digests.proof import prove
from tests.support import making

folder, device, Core = Path.cwd(), torch.device("cpu"), METHODS["core"]
base = making.write(folder / "base.safetensors", making.model())
checkpoint = kilodelta.Checkpoint.open(base)

def loaded(bits):
    size = making.delta(base, Core(rank=5), bits=bits).save(folder / "task.kd")
    delta = kilodelta.load(folder / "task.kd", base=base)
    assert size == (folder / "task.kd").stat().st_size == delta.file_size()
    return delta

def update(delta, name):
    "The oracle: the page's scalar loops, scaled."
    target = delta.target(name)
    q = {group: values.tolist() for group, values in delta.coefficients(name).items()}
    seed = delta.manifest.seed
    dq = np.array(Core(rank=5).scalar(q, target.matrix, seed, target.index))
    assert np.array_equal(delta.expand(name), dq), name
    assert np.abs(dq).max() <= delta.bound(name)
    c, e = delta.scale(name)
    return np.ldexp(c * dq.astype(np.float64), e)

def merges_everywhere(delta, name):
    target, data = delta.target(name), checkpoint.data(name)
    on_cpu = b"".join(part.tobytes() for part in cpu.merged(delta, target, data))
    on_unit = b"".join(p.tobytes() for p in stream.merged(delta, target, data, device, 64))
    assert on_cpu == on_unit != data.tobytes(), name
    factors = delta.factors(name)
    for stack in stacks.stacks(delta, [name]):
        wanted = factors.left if stack.is_left else factors.right
        assert np.array_equal(stack.values[0], wanted)

def is_an_adapter(delta, name):
    wanted, pair = update(delta, name), exact_pair(delta, name, "F32")
    B, A = (np.frombuffer(m.tobytes(), "<f4").reshape(m.shape) for m in (pair.B, pair.A))
    assert np.allclose(B.astype(np.float64) @ A, wanted, rtol=1e-5)
    info = checkpoint.info(name)
    layout = AdapterLayout(
        base_name="", base_root=delta.manifest.base.root, rank=8, slots=0, dtype="float32",
        optional=False, exposed=(Exposed(info=info, use="turned"),),
    )
    A, B = (expand(delta, layout)[port].astype(np.float64) for port in layout.exposed[0].names)
    assert np.allclose((A @ B).T, wanted, rtol=1e-5)

for bits in (4, 8, 16):
    delta = loaded(bits)
    for name in delta.targets:
        update(delta, name)
        merges_everywhere(delta, name)
    out = folder / f"merged{bits}.safetensors"
    kilodelta.merge(base, folder / "task.kd", out)
    assert prove(base, folder / "task.kd", out).targets == 5

alone = making.Patterns(include=("tall.weight",))
one = making.delta(base, Core(rank=5), patterns=alone)
is_an_adapter(one, "tall.weight")
require_good_unit(unit_for(device, Core(rank=5)), "core")

targets = list(delta.targets.values())
def chosen(bytes, bits):
    return budget.choose(bytes, lambda method: 1000, targets, bits=bits, family="core").method
assert chosen(3000, 4) == Core(rank=8)  # the narrowest side
assert chosen(1200, 8) == Core(rank=6)  # 5 x 36 bytes of 200; 5 x 49 are too many

assert kilodelta.inspect(folder / "task.kd").method == {"name": "core", "rank": 5}
assert "core" in CliRunner().invoke(main, ["compress", "--help"]).output
shown = CliRunner().invoke(main, ["inspect", str(folder / "task.kd")])
assert shown.exit_code == 0 and "core" in shown.output, shown.output
"""


def test_the_page_makes_a_method_that_every_room_knows(tmp_path: Path) -> None:
    """One process, for torch takes seconds to load: the page's own check, then all rooms."""
    run(RUN + EVERYWHERE, tmp_path, overlay(tmp_path / "tree"), ROOT)


def test_a_method_of_another_package_is_registered(tmp_path: Path) -> None:
    """The same files elsewhere, and one call in place of the line."""
    for name, content in FILES.items():
        place = tmp_path / "my_package" / Path(name).relative_to("kilodelta/format/methods")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(content.replace("kilodelta.format.methods.core", "my_package.core"))
    first = """
from kilodelta import train
from kilodelta.format.methods import register
assert not hasattr(train, "Core")
register("my_package.core.spec:Core")
"""
    run(first + RUN, tmp_path, ROOT)


class Again(methods.Nola):
    """Another method under a name that is taken."""


class Clash(methods.Lora):
    """A method that takes RandLoRA's random numbers."""

    name = "clash"
    roles = (3, 11)


def test_names_and_roles_are_taken_once() -> None:
    before = dict(methods.TABLE)
    with pytest.raises(InputError, match="there is a method 'nola' already"):
        register(f"{__name__}:Again")
    with pytest.raises(InputError, match=r"roles \(3, 11\) of clash overlap those of randlora"):
        register(f"{__name__}:Clash")
    assert before == methods.TABLE
    assert register(methods.TABLE["vera"]) is METHODS["vera"]


def test_no_two_methods_share_a_role() -> None:
    roles = [role for kind in METHODS.values() for role in kind.roles]
    assert len(roles) == len(set(roles))


@pytest.mark.parametrize("name", METHODS)
def test_the_parts_that_a_method_names_are_there(name: str) -> None:
    from kilodelta.compress.training.factors import TrainableFactors
    from kilodelta.format.methods import load_part

    kind = METHODS[name]
    assert kind.name == name
    assert issubclass(load_part(kind.trainable), TrainableFactors)
    assert not kind.on_gpu or callable(load_part(kind.on_gpu))
    for sample in kind.samples():
        assert type(sample) is kind
        options = sample.to_manifest()
        assert options.pop("name") == name
        for option, value in options.items():
            kind.checks[option](value, option)
