"""Applying kilobytes to what is deployed: all-MiniLM-L6-v2 in ONNX Runtime on the CPU.

    python benchmarks/apply.py [--json FILE] [--kills N] [--only SECTION[,SECTION]]

Sections are adapter, patch, apply, footprint and kills.

Prints ratios first: what must be reached over what was measured, so that 1 and more is enough; or
the opponent's time over ours, with what it must be. The opponents run in the same process, in turn:

- the merged model exported to ONNX, for request time;
- merging, exporting to ONNX and opening the result anew, which `apply` replaces.

Fine-tunes are NOLA, rank 8, k = 256, 36 matrices, random coefficients, each with a probe.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe, peak_memory

from kilodelta.verify.runners.timing import side_by_side

ROWS, TOKENS = 4, 64
WORDS = (1000, 20000)
RANK, BASES, MATRICES = 8, 256, 36
FINE_TUNES = 4
TURNS = 10


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """A base, its device folders by mode, fine-tunes, and one of them merged and exported."""

    root: Path
    base: Path
    devices: dict[str, Path]
    files: list[Path]
    exported: Path

    @property
    def inputs(self) -> Path:
        return self.root / "inputs.npz"


def main() -> None:
    """Run what is asked for and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--only", default="adapter,patch,apply,footprint,kills")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    rows: list[dict[str, Any]] = []
    with _folder() as root:
        fleet = prepare(root)
        sections: dict[str, Callable[[Fleet], list[dict[str, Any]]]] = {
            "adapter": adapter,
            "patch": patch,
            "apply": apply,
            "footprint": footprint,
            "kills": lambda fleet: kills(fleet, options.kills),
        }
        for name in options.only.split(","):
            rows += sections[name](fleet)
    machine = {
        **describe(),
        "threads": f"{os.cpu_count()}; a switch of this size takes one",
        "load": f"{load:.1f} before the run, {os.getloadavg()[0]:.1f} at its end",
    }
    report = {"machine": machine, "rows": rows}
    _print(report)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=os.environ.get("KILODELTA_BENCH")) as name:
        yield Path(name)


def _print(report: dict[str, Any]) -> None:
    for name, value in report["machine"].items():
        print(f"{name:10} {value}")
    print(f"\n{'ratio':>8}  {'must be':>8}  {'measured':>12}  {'against':>12}  what")
    for row in report["rows"]:
        measured, against = (f"{row[key]:.4g} {row['unit']}" for key in ("measured", "against"))
        print(
            f"{row['ratio']:>7.2f}x  {row['must']:>7.2f}x  {measured:>12}  {against:>12}  "
            f"{row['what']}"
        )


def _row(
    what: str, measured: float, against: float, *, unit: str, must: float = 1.0
) -> dict[str, Any]:
    ratio = against / measured if measured else float(against >= measured)
    return {
        "what": what,
        "measured": measured,
        "against": against,
        "ratio": ratio,
        "must": must,
        "unit": unit,
        "reached": ratio >= must,
    }


def prepare(root: Path) -> Fleet:
    """Everything that a build machine does, not timed."""
    from fidelity_task import base_folder  # torch, which would be in every child's memory

    import kilodelta
    from kilodelta.device import bundle
    from kilodelta.device.golden import reference
    from kilodelta.export.onnx.make import export_template
    from kilodelta.export.onnx.save import save
    from kilodelta.export.onnx.template import fill_template
    from kilodelta.models import open_model

    base = root / "base"
    shutil.copytree(base_folder(), base)
    rng = np.random.default_rng(0)
    ids = rng.integers(*WORDS, (ROWS, TOKENS))
    ones, zeros = np.ones_like(ids), np.zeros_like(ids)
    np.savez(root / "inputs.npz", input_ids=ids, attention_mask=ones, token_type_ids=zeros)
    files = [_fine_tune(base, root, seed) for seed in range(1, 1 + FINE_TUNES)]
    devices = {}
    for mode in ("adapter", "patch"):
        bundle(base, root / mode, mode=mode, rank=RANK, probe=str(root / "inputs.npz"))
        devices[mode] = root / mode
    loaded = open_model(base)
    batch = reference.golden_inputs(loaded, str(root / "inputs.npz"), reference.ROWS)
    template = export_template(loaded, batch)
    kilodelta.merge(base, files[0], root / "merged")
    save(fill_template(template, root / "merged"), root / "merged.onnx")
    return Fleet(
        root=root,
        base=base,
        devices=devices,
        files=files,
        exported=root / "merged.onnx",
    )


def _fine_tune(base: Path, root: Path, seed: int) -> Path:
    """A released `.kd` file with random coefficients and a probe of two rows."""
    from kilodelta.device import release
    from kilodelta.format.methods import Nola
    from kilodelta.format.targets import Patterns
    from kilodelta.merging import build

    patterns = Patterns(include=("encoder.layer.*.weight",), exclude=("*LayerNorm*",))
    method, rng = Nola(rank=RANK, bases=BASES), np.random.default_rng(seed)
    targets = build.targets(base, patterns)
    assert len(targets) == MATRICES
    numbers = {
        target.name: build.quantise_target(
            method,
            {g.name: rng.normal(size=g.shape) * 0.003 for g in method.groups(target)},
            8,
        )
        for target in targets
    }
    recipe = build.Recipe(method=method, patterns=patterns, seed=seed, name="all-MiniLM-L6-v2")
    build.build(base, recipe, numbers).save(root / f"{seed}.raw.kd")
    out = root / f"{seed}.kd"
    release(base, root / f"{seed}.raw.kd", out, version=1, inputs=str(root / "inputs.npz"))
    return out


def _batch(fleet: Fleet) -> dict[str, Any]:
    from kilodelta.files.npz import read_npz

    return read_npz(fleet.inputs)


def adapter(fleet: Fleet) -> list[dict[str, Any]]:
    """Switching, request time and outputs of adapter mode."""
    from kilodelta.device import Device
    from kilodelta.verify.runners.onnx_runner import OnnxRunner

    device, batch = Device(fleet.devices["adapter"]), _batch(fleet)
    device.session(fleet.files[0])  # kernels are loaded, the session is open
    spent = []
    for turn, file in itertools.product(range(TURNS), fleet.files[1:]):
        fresh = shutil.copy(file, fleet.root / f"{turn}-{file.name}")  # never seen by this device
        began = time.perf_counter()
        device.session(fresh)
        spent.append(time.perf_counter() - began)
    merged = OnnxRunner(fleet.exported, device="cpu")
    merged.available()
    times = side_by_side(
        {
            "adapter": lambda: device.run(batch, fleet.files[0]),
            "merged": lambda: merged.run(batch),
        },
        repeats=30,
    )
    what = f"{MATRICES} matrices, NOLA rank {RANK}, k = {BASES}"
    return [
        _row(f"adapter: switch to a new .kd, {what}", min(spent) * 1e3, 10.0, unit="ms"),
        _row("the same, median", float(np.median(spent)) * 1e3, 10.0, unit="ms"),
        _row(
            f"adapter: request at batch {ROWS}, {TOKENS} tokens, against the merged model's time",
            times["adapter"] * 1e3,
            times["merged"] * 1e3,
            unit="ms",
            must=1 / 1.2,
        ),
        *_parity(fleet, device.run(batch, fleet.files[0])),
    ]


def _parity(fleet: Fleet, found: Any) -> list[dict[str, Any]]:
    """Outputs against the merged model in float64, and the limit of the float32 gate."""
    from kilodelta.device.golden import reference
    from kilodelta.models import open_model

    loaded = open_model(fleet.root / "merged")
    known = reference.exact(loaded, reference.golden_inputs(loaded, str(fleet.inputs), ROWS))
    limits, rows = reference.limits(loaded, known, "float32"), []
    for name, error in reference.distances(found, known).items():
        most = limits[name]
        what = f"adapter: {name}, relative {{}} to float64; the float32 gate's limit"
        rows += [
            _row(what.format("L2"), error.relative_l2, most.relative_l2, unit=""),
            _row(what.format("maximum"), error.relative_max, most.relative_max, unit=""),
        ]
    return rows


def patch(fleet: Fleet) -> list[dict[str, Any]]:
    """Time, memory and bytes of patch mode."""
    out = fleet.root / "patched.onnx"
    found = [_patch_in_child(fleet, out) for _ in range(3)]
    same = out.read_bytes() == fleet.exported.read_bytes()
    size = fleet.exported.stat().st_size / 1e6
    return [
        _row("patch: the tuned ONNX file, proved, fsync", min(f[0] for f in found), 1.0, unit="s"),
        _row(
            "patch: peak anonymous memory of the whole process, against 1.2x the ONNX file",
            max(f[1] for f in found) / 1e6,
            1.2 * size,
            unit="MB",
        ),
        _row(
            "the same beyond the interpreter with numba loaded and its kernels proved",
            max(f[1] - f[2] for f in found) / 1e6,
            1.2 * size,
            unit="MB",
        ),
        _row(
            "patch: bytes that differ from an export of the merged model",
            float(not same),
            0.0,
            unit="files",
        ),
    ]


def _patch_in_child(fleet: Fleet, out: Path) -> tuple[float, int, int]:
    out.unlink(missing_ok=True)
    return _child(_patch, fleet.devices["patch"], fleet.files[0], out)


def _patch(device: Path, file: Path, out: Path) -> None:
    from kilodelta.device.modes.patch import MAP, REST
    from kilodelta.export.patching.map_file import read_map
    from kilodelta.export.patching.rewrite import patch

    base = device / "base"
    rest = base / REST if (base / REST).exists() else None
    patch(base / "model.onnx", file, out, places=read_map(base / MAP), base=rest)


def _child(work: Callable[..., None], *arguments: Any) -> tuple[float, int, int]:
    """Of work in a fresh process, kernels loaded before: seconds, the peak of its anonymous bytes,
    and what they were before it."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measured, args=(sender, work, arguments))
    process.start()
    found: tuple[float, int, int] = receiver.recv()
    process.join()
    return found


def _measured(sender: Any, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    from kilodelta.exact.selftest import require_good_kernels

    require_good_kernels()
    with peak_memory() as peak:
        before, began = peak(), time.perf_counter()
        work(*arguments)
        seconds = time.perf_counter() - began
        sender.send((seconds, peak(), before))


def apply(fleet: Fleet) -> list[dict[str, Any]]:
    """`apply` from end to end, probe included, against merging, exporting and opening anew."""
    from kilodelta.device import apply

    def applier(mode: str) -> Callable[[], object]:
        turns = itertools.cycle(fleet.files)
        return lambda: apply(fleet.devices[mode], next(turns))

    runs = {mode: applier(mode) for mode in fleet.devices}
    times = side_by_side({**runs, "anew": lambda: _anew(fleet)}, repeats=3)
    return [
        _row(
            f"{mode}: apply with probe, against merging, exporting and opening anew",
            times[mode],
            times["anew"],
            unit="s",
            must=20.0,
        )
        for mode in fleet.devices
    ]


def _anew(fleet: Fleet) -> None:
    """What a build machine does for every fine-tune today, and the device's first request."""
    from kilodelta.export.pipeline import export
    from kilodelta.verify.runners.onnx_runner import OnnxRunner

    shutil.rmtree(fleet.root / "anew", ignore_errors=True)
    done = export(fleet.base, fleet.files[0], fleet.root / "anew")
    model = done.path / done.manifest.artefacts[0].file
    OnnxRunner(model, device="cpu").run(_batch(fleet))


def footprint(fleet: Fleet) -> list[dict[str, Any]]:
    """Import time, and the memory of `apply` beyond what the runtime itself takes."""
    rows = [_row(what, _fresh(code), 0.5, unit="s") for what, code in IMPORTS.items()]
    for mode, device in fleet.devices.items():
        _child(_apply, device, fleet.files[0])  # the base's own outputs are remembered from here
        ours = max(_child(_apply, device, file)[1] for file in fleet.files[1:3])
        runtime = max(_child(_only_run, device, fleet.files[1])[1] for _ in range(2))
        what = f"{mode}: memory of apply beyond that of the runtime opened on the result"
        rows.append(_row(what, max(ours - runtime, 0) / 1e6, 100.0, unit="MB"))
    return rows


def _apply(device: Path, file: Path) -> None:
    from kilodelta.device import apply

    apply(device, file)


def _only_run(device: Path, file: Path) -> None:
    """The runtime on what is served, and one request: nothing of it is kilodelta's work."""
    from kilodelta.device import Device
    from kilodelta.device.golden import golden

    served = Device(device)
    served.run(golden.read(device / "base" / golden.FILE).inputs)


_DEVICE = (
    "import kilodelta.device.serving, kilodelta.device.update.apply\n"
    "import kilodelta.device.modes.adapter, kilodelta.device.modes.patch\n"
)
_KERNELS = "from kilodelta.exact import fused, ordered, philox, rounding\n"
_PROVED = "from kilodelta.exact.selftest import require_good_kernels as prove; prove()\n"
IMPORTS = {
    "import of the device side, fresh process": _DEVICE,
    "the same and numba with the kernels, which the first fine-tune decoded loads": _DEVICE
    + _KERNELS,
    "the same and the kernels proved: numba's own first use": _DEVICE + _KERNELS + _PROVED,
}


def _fresh(code: str) -> float:
    """The least seconds that code takes in a fresh process, the interpreter's start aside."""
    code = f"import time; began = time.perf_counter()\n{code}print(time.perf_counter() - began)"
    took = [subprocess.check_output([sys.executable, "-c", code], text=True) for _ in range(7)]
    return min(map(float, took))


def kills(fleet: Fleet, count: int) -> list[dict[str, Any]]:
    """Applies killed at random moments, half in each mode; every one serves the old or the new."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["kilodelta.device.update.apply", "onnxruntime"])
    rows = []
    for mode, device in fleet.devices.items():
        mixtures, lost, served = _killed(context, device, fleet, count // len(fleet.devices))
        what = f"{mode}: {{}} after {count // len(fleet.devices)} kills (served: {served})"
        rows += [
            _row(what.format("mixtures"), float(mixtures), 0.0, unit=""),
            _row(what.format("lost states"), float(lost), 0.0, unit=""),
        ]
    return rows


def _killed(context: Any, device: Path, fleet: Fleet, count: int) -> tuple[int, int, str]:
    """(mixtures, lost states, how often each of two fine-tunes was served)."""
    from kilodelta.device import Device, apply

    chance, batch, pair = random.Random(11), _batch(fleet), fleet.files[:2]
    known = {file.stem: Device(device).run(batch, file) for file in pair}
    began = time.perf_counter()
    for file in pair:
        apply(device, file)
    longest = 2 * (time.perf_counter() - began)
    served, mixtures, lost = dict.fromkeys(known, 0), 0, 0
    for _ in range(count):
        _kill(context, device, pair, chance.uniform(0.0, longest))
        try:
            name = _named(device, batch, known)
        except Exception:
            lost += 1
            continue
        mixtures += name is None
        served[name or pair[0].stem] += name is not None
    return mixtures, lost, ", ".join(f"{name} {times}x" for name, times in served.items())


def _named(device: Path, batch: Any, known: dict[str, Any]) -> str | None:
    """Which fine-tune is served, by digests and outputs; None for a mixture."""
    from kilodelta.device import Device, status

    status(device, check=True)
    found = Device(device).run(batch)
    for name, outputs in known.items():
        if all(np.allclose(found[key], value, atol=1e-6) for key, value in outputs.items()):
            return name
    return None


def _kill(context: Any, device: Path, pair: list[Path], delay: float) -> None:
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_apply_for_ever, args=(sender, device, pair))
    process.start()
    receiver.recv()
    time.sleep(delay)
    process.kill()
    process.join()


def _apply_for_ever(sender: Any, device: Path, pair: list[Path]) -> None:
    from kilodelta.device import apply
    from kilodelta.exact.selftest import require_good_kernels

    require_good_kernels()
    sender.send("ready")
    for file in itertools.cycle(reversed(pair)):
        apply(device, file)


if __name__ == "__main__":
    main()
