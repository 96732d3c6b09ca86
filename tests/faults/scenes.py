"""Commands that change something on the disk: how each is made ready, done, and judged."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import kilodelta
from kilodelta.device import apply, modes, pull, release, rollback, status
from kilodelta.device.folder.journal import Journal
from kilodelta.device.folder.state import parse_state
from kilodelta.files import model_digest
from kilodelta.format.file import load
from kilodelta.verify.digests.proof import prove
from tests.doubles import numpy_device
from tests.support import making
from tests.support.devices import Bench

OLD, NEW = "old", "new"


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A command and what it changes.

    Attributes:
        name: the command's.
        ready: fills a folder with all that the command needs.
        act: does it, in a copy of that folder.
        judge: says whether the result is the old or the new one; raises on anything else.
        left: names that should not lie about once the command has been done again.
        again: makes way for doing it again, where it refuses to replace its result.
        costly: takes seconds, so it gets a tenth of the others' faults.
        needs: packages without which it cannot be run.
    """

    name: str
    ready: Callable[[Path], object]
    act: Callable[[Path], object]
    judge: Callable[[Path], str]
    left: Callable[[Path], list[str]]
    again: Callable[[Path], object] = lambda work: None
    costly: bool = False
    needs: tuple[str, ...] = ()


def stages(work: Path) -> list[str]:
    """Stages and temporary files anywhere in a folder."""
    names = (str(path.relative_to(work)) for path in work.rglob("*"))
    return [n for n in names if ".kilodelta." in n or n.endswith(".tmp") or "/tmp" in f"/{n}"]


def _only(*expected: str) -> Callable[[Path], list[str]]:
    """Whatever lies at the top of a folder beside what should."""
    return lambda work: sorted({*os.listdir(work)} - {*expected}) + stages(work)


# apply and rollback: a device of the linear model


def _device(work: Path) -> Bench:
    modes.OPENERS["patch"] = numpy_device.StandIn
    bench = Bench(work)
    apply(bench.device, bench.files["a"])
    return bench


class _Standing(Bench):
    """A device folder that lies there already."""

    def __init__(self, work: Path) -> None:
        self.root, self.device = work, work / "device"
        self.base = work / "base.safetensors"
        self.files = {name: work / f"{name}.kd" for name in "ab"}
        self.outputs = {"base": self.expected(None)}
        self.outputs |= {name: self.expected(file) for name, file in self.files.items()}


def _serves(old: str, new: str) -> Callable[[Path], str]:
    def judge(work: Path) -> str:
        served = _Standing(work).serves(check=True)
        return {old: OLD, new: NEW}[served]

    return judge


def _about(work: Path) -> list[str]:
    """What the last two states do not name: whoever serves the one before may still read it."""
    device = work / "device"
    names = {path.name for path in (device / "deltas").iterdir()}
    states = [entry["state"] for entry in Journal(device / "journal").entries() if "state" in entry]
    for state in states[-2:]:
        names -= parse_state(state).names()
    return sorted(names) + stages(work)


def _back(work: Path) -> None:
    apply(work / "device", work / "a.kd")


def _rolling(work: Path) -> None:
    bench = _device(work)
    apply(bench.device, bench.files["b"])


def _forward(work: Path) -> None:
    if _Standing(work).serves() != "b":
        apply(work / "device", work / "b.kd")


# merge, compress, release, export and bundle: one result at a new place


def _base_and_delta(work: Path) -> None:
    base = making.folder(work / "base", making.model(), shards=2)
    making.delta(base, making.METHODS[0]).save(work / "task.kd")


def _merge(work: Path) -> None:
    kilodelta.merge(work / "base", work / "task.kd", work / "out", threads=1)


def _merged(work: Path) -> str:
    if not (work / "out").exists():
        return OLD
    prove(work / "base", work / "task.kd", work / "out")
    return NEW


def _remove(work: Path) -> None:
    for path in (work / "out", *work.glob("out.kd*")):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _two_models(work: Path) -> None:
    tensors = making.model()
    making.write(work / "base.safetensors", tensors)
    tuned = {n: (d, s, data[:-1] + b"\x01") for n, (d, s, data) in tensors.items()}
    making.write(work / "tuned.safetensors", tuned)


def _compress(work: Path) -> None:
    from kilodelta.compress import compress

    compress(work / "base.safetensors", work / "tuned.safetensors", work / "out.kd")


def _compressed(work: Path) -> str:
    if not (work / "out.kd").exists():
        return OLD
    prove(work / "base.safetensors", work / "out.kd")
    return NEW


def _to_release(work: Path) -> None:
    from kilodelta.trust import keygen

    base = numpy_device.base(work / "base.safetensors")
    numpy_device.delta(base, 1).save(work / "task.kd")
    keygen(work / "team")


def _release(work: Path) -> None:
    release(
        work / "base.safetensors",
        work / "task.kd",
        work / "out.kd",
        version=7,
        sign=[work / "team.key"],
        task="intents",
        pedigree=True,
    )


def _released(work: Path) -> str:
    if not (work / "out.kd").exists():
        return OLD
    load(work / "out.kd", base=work / "base.safetensors")
    _verify(work / "out.kd", work / "team.pub")
    json.loads((work / "out.kd.cdx.json").read_text())
    return NEW


def _verify(file: Path, public: Path) -> None:
    from kilodelta.export.manifest.artefacts import file_fact
    from kilodelta.trust import read_public, verify
    from kilodelta.trust.envelope import read_signature

    data = read_signature(file)
    assert data is not None, "a release that was to be signed stands unsigned"
    statement, _ = verify(data, [read_public(public)], 1)
    assert statement.file == file_fact(file).sha256


def _pico(work: Path) -> None:
    from kilodelta.format.methods import Lora
    from kilodelta.format.targets import Patterns
    from tests.support import pico

    base = pico.bert(work / "base", layers=1)
    patterns = Patterns(include=("encoder.*.dense.weight",))
    making.delta(base, Lora(rank=2), patterns=patterns).save(work / "task.kd")


def _export(work: Path) -> None:
    from kilodelta.export import export

    export(work / "base", work / "task.kd", work / "out")


def _exported(work: Path) -> str:
    from kilodelta.verify.digests.exported import check_export

    if not (work / "out").exists():
        return OLD
    check_export(work / "out", work / "task.kd", prove(work / "base", work / "task.kd"))
    return NEW


def _bundle(work: Path) -> None:
    from kilodelta.device import bundle

    bundle(work / "base", work / "out", mode="patch")


def _bundled(work: Path) -> str:
    if not (work / "out").exists():
        return OLD
    found = status(work / "out", check=True).bundle.base_root
    assert found == model_digest.digest(work / "base").root
    return NEW


# publish and pull: a mirror on loopback


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


class _Server(ThreadingHTTPServer):
    def handle_error(self, *_: Any) -> None:
        """Say nothing: a client that is killed breaks its connection."""


_SERVER: list[ThreadingHTTPServer] = []


def _url(work: Path) -> str:
    """Serve whatever lies in `repo/` of the present folder; one server does for all."""
    if not _SERVER:
        _SERVER.append(_Server(("127.0.0.1", 0), _Quiet))
        threading.Thread(target=_SERVER[0].serve_forever, daemon=True).start()
    _SERVER[0].RequestHandlerClass = partial(_Quiet, directory=str(work / "repo"))
    return f"http://127.0.0.1:{_SERVER[0].server_port}"


def _mirror(work: Path) -> None:
    """A team's key, two signed releases, the first of them published, and a device."""
    from kilodelta.device.update.trust import pins_from, write_pins
    from kilodelta.trust import keygen, publish

    base = numpy_device.base(work / "base.safetensors")
    numpy_device.delta(base, 1).save(work / "raw.kd")
    keys = keygen(work / "team")
    for version in (1, 2):
        out = work / f"task-{version}.kd"
        release(base, work / "raw.kd", out, version=version, sign=[keys.private], task="intents")
    publish([work / "task-1.kd"], work / "repo", key=keys.private)
    numpy_device.folder(work / "device", base)
    pins = pins_from([keys.public], threshold=1, task="intents", kind="")
    assert pins is not None
    write_pins(work / "device" / "trust.json", pins)
    shutil.copy(work / "repo" / "metadata" / "1.root.json", work / "device" / "root.json")


def _publish(work: Path) -> None:
    from kilodelta.trust import publish

    publish([work / "task-2.kd"], work / "repo", key=work / "team.key")


def _published(work: Path) -> str:
    """What a client that starts anew is given."""
    shutil.rmtree(work / "device" / "mirror", ignore_errors=True)
    found = pull(work / "device", _url(work))
    assert found is not None
    assert found.path.read_bytes() == (work / f"task-{found.version}.kd").read_bytes()
    return {1: OLD, 2: NEW}[found.version]


def _both(work: Path) -> None:
    _mirror(work)
    pull(work / "device", _url(work))
    _publish(work)


def _pull(work: Path) -> None:
    pull(work / "device", _url(work))


def _pulled(work: Path) -> str:
    """Which releases lie there whole; a client has to go on from whatever was left."""
    targets = work / "device" / "mirror" / "targets"
    whole = {
        version
        for version in (1, 2)
        if (targets / f"task-{version}.kd").is_file()
        and (targets / f"task-{version}.kd.sig").is_file()
    }
    assert 1 in whole
    for version in whole:
        _verify(targets / f"task-{version}.kd", work / "team.pub")
    return NEW if 2 in whole else OLD


RELEASE = ("out.kd", "out.kd.sig", "out.kd.cdx.json")
KEYS = tuple(f"team{suffix}" for suffix in (".key", ".pub", ".p256.key", ".p256.pub"))
_ONNX = ("torch", "transformers", "onnxscript", "onnxruntime")
_TUF = ("tuf", "filelock", "cryptography", "securesystemslib")
SCENES: Mapping[str, Scene] = {
    scene.name: scene
    for scene in (
        Scene(
            name="apply",
            ready=_device,
            act=lambda work: apply(work / "device", work / "b.kd"),
            judge=_serves("a", "b"),
            left=_about,
            again=_back,
        ),
        Scene(
            name="rollback",
            ready=_rolling,
            act=lambda work: rollback(work / "device"),
            judge=_serves("b", "a"),
            left=_about,
            again=_forward,
        ),
        Scene(
            name="merge",
            ready=_base_and_delta,
            act=_merge,
            judge=_merged,
            left=_only("base", "task.kd", "out"),
            again=_remove,
        ),
        Scene(
            name="release",
            ready=_to_release,
            act=_release,
            judge=_released,
            left=_only("base.safetensors", "task.kd", *RELEASE, *KEYS),
            again=_remove,
            needs=("cryptography", "securesystemslib"),
        ),
        Scene(
            name="compress",
            ready=_two_models,
            act=_compress,
            judge=_compressed,
            left=_only("base.safetensors", "tuned.safetensors", "out.kd"),
            again=_remove,
            needs=("torch",),
        ),
        Scene(
            name="publish", ready=_mirror, act=_publish, judge=_published, left=stages, needs=_TUF
        ),
        Scene(name="pull", ready=_both, act=_pull, judge=_pulled, left=stages, needs=_TUF),
        Scene(
            name="export",
            ready=_pico,
            act=_export,
            judge=_exported,
            left=_only("base", "task.kd", "out"),
            again=_remove,
            costly=True,
            needs=_ONNX,
        ),
        Scene(
            name="bundle",
            ready=_pico,
            act=_bundle,
            judge=_bundled,
            left=_only("base", "task.kd", "out"),
            again=_remove,
            costly=True,
            needs=_ONNX,
        ),
    )
}
"""By name."""
