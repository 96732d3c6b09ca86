"""Compress before and now: memory, seconds per step, and time to equal agreement.

    python benchmarks/compress.py [--parts decoder memory sets] [--old COMMIT] [--threads N]
        [--json FILE] [--trees old new] [--layers 30] [--dtypes fp32 mixed mixed-int8 bf16]
        [--kinds compress peft] [--sets trec6 banking77] [--seeds 0 1] [--tried 800 400 267]
        [--batch 32]

`decoder`: a Llama-shaped decoder of 135M random weights in bfloat16 (30 layers, 49,152 words), on
4 x 128 tokens: the build of `--old` from a git worktree, this one in float32 and in bfloat16, and
PEFT's LoRA r = 8 in both types. Each runs in a separate process, whose peak of resident memory is
what the system counted, before the first step and in all. That holds the pages of mapped files,
which the system takes back where memory is short; `peak_anonymous_gb` is the peak without them, of
samples 20 ms apart.

`memory`: what this build's run on the same decoder holds beside packages and activations, over the
checkpoint's bytes. Activations are what grows with the rows of a step: the peaks of several batches
lie on a line, and what it says of none is held whatever the batch. Of that, packages are the peak
of the same run on a decoder of a few kilobytes, which loads the same libraries and kernels.

`sets`: all-MiniLM-L6-v2 on the sets of `--data` at 12 KB: agreement on held-out inputs and seconds
of the old build's 800 steps, and of this one's at the numbers of steps that `--tried` names, for
each seed of teacher and compression. `test_agreement` (in per cent) and `test_divergence` compare
the merged file with the teacher on the test texts, six times as many as are held out on Banking77:
what two trainings differ by is often less than what 512 inputs tell. `--dtypes` names the types:
float32 alone by default here, float32 and bfloat16 for the decoder, whose base is stored in
bfloat16, so that `mixed` is not for it. The old build knew float32 only.

Runs that `--json` holds already are not run again, so that an interrupted benchmark goes on.

Beside seconds stands the processor time of a step, all threads together: on a machine that does
other work, it says more.

`--quick` takes 2 steps and one size, to see that it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from importlib import import_module
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
OLD = "44d725c"
"""The build before compress was made to scale, and faster."""
ROWS, TOKENS, WORDS = 4, 128, 49_152
ROWS_TRIED = (2, 4, 6, 8)
"""Of a step, to tell what grows with them."""
SMALL = 256
"""Words of the decoder that is too small to count."""
SETS = ("trec6", "banking77")
DTYPES = ("fp32", "mixed", "mixed-int8", "bf16")
TREES = ("old", "new")
KINDS = ("compress", "peft")
FILE = "run.kd"
"""What a run leaves in its folder."""
SAMPLED_S = 0.02
"""Seconds between two samples of a child's anonymous memory."""


def main() -> None:
    """Run what is asked for, and print one line per process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=("decoder",))
    parser.add_argument("--old", default=OLD, help="commit of the build to compare with")
    parser.add_argument(
        "--trees", nargs="+", choices=TREES, default=TREES, help="builds that are run"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8, help="of the decoder")
    parser.add_argument("--layers", type=int, default=30, help="of the decoder")
    parser.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, help="types of the frozen base (see above)"
    )
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=KINDS, help="trainings of the decoder"
    )
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS)
    parser.add_argument("--seeds", nargs="+", type=int, default=(0,), help="of the sets")
    parser.add_argument("--tried", nargs="+", type=int, default=(800, 400, 267), help="steps")
    parser.add_argument("--batch", type=int, help="rows of a step of this build, on the sets")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--work", type=Path, default=Path("compress-benchmark"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    options = parser.parse_args()
    if options.child:
        _child(json.loads(options.child))
        return
    options.work.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"machine": describe(), "threads": options.threads, "runs": []}
    if options.json is not None and options.json.exists():
        found["runs"] = json.loads(options.json.read_text())["runs"]
    found["runs"] = [run for run in found["runs"] if "error" not in run]
    done = {_key(run) for run in found["runs"]}
    with _worktree(options.old) if "old" in options.trees else nullcontext(ROOT) as old:
        for part in options.parts:
            for job in PARTS[part](options):
                if _key(job) in done:
                    continue
                tree = old if job.get("tree") == "old" else ROOT
                result = {**_without_paths(job), **_run(job, tree, options.threads)}
                if part == "sets" and "error" not in result:
                    result |= _on_tests(job, options.data)
                print(json.dumps({k: v for k, v in result.items() if k != "options"}), flush=True)
                found["runs"].append(result)
                _write(options.json, found)  # after each run: a whole one takes an hour
    runs = [run for run in found["runs"] if run["part"] == "memory" and "error" not in run]
    for dtype in sorted({run["dtype"] for run in runs}):
        times = held_of_checkpoint([run for run in runs if run["dtype"] == dtype])
        print(f"{dtype}: {times:.2f} times the checkpoint beside packages and activations")


def _without_paths(job: Mapping[str, Any]) -> dict[str, Any]:
    """Return a job as it is reported: where its files lie says nothing elsewhere."""
    paths = ("base", "tuned", "inputs", "out", "labels")
    options = {name: value for name, value in job["options"].items() if name not in paths}
    return {**{name: v for name, v in job.items() if name not in paths}, "options": options}


def _key(job: Mapping[str, Any]) -> str:
    """Return what tells one run from another, wherever its files lie."""
    named = {name: job.get(name) for name in ("part", "kind", "tree", "layers", "steps", "seed")}
    return json.dumps({**named, **_without_paths(job)["options"]}, sort_keys=True)


def _write(path: Path | None, found: Mapping[str, Any]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n")


@contextmanager
def _worktree(commit: str) -> Iterator[Path]:
    """Check out a commit beside this tree, for as long as the benchmark takes."""
    git = ["git", "-C", str(ROOT), "worktree"]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "old"
        subprocess.run([*git, "add", "-q", "--detach", str(place), commit], check=True)
        try:
            yield place
        finally:
            subprocess.run([*git, "remove", "--force", str(place)], check=True)


def _run(job: Mapping[str, Any], tree: Path, threads: int) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, __file__, "--child", json.dumps(job)]
    with (
        tempfile.TemporaryFile("w+") as out,
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdout=out, stderr=errors, env=environment) as child,
    ):
        anonymous = 0.0
        while child.poll() is None:
            anonymous = max(anonymous, _memory("RssAnon", child.pid))
            time.sleep(SAMPLED_S)
        out.seek(0), errors.seek(0)
        if child.returncode:
            return {"error": errors.read().strip().splitlines()[-1:]}
        result: dict[str, Any] = json.loads(out.read().splitlines()[-1])
    return {**result, "peak_anonymous_gb": round(anonymous, 3)}


def _decoder(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the decoder's runs, its files made first."""
    common = _decoder_files(options, options.layers)
    chosen = _decoder_options(options)
    dtypes = _narrow_base(options.dtypes or ("fp32", "bf16"))
    # Of old and new in turns, so that a machine that slows down slows both.
    old = [("compress", "old", "fp32")]  # it knew no other type
    now = [(kind, "new", dtype) for kind in options.kinds for dtype in dtypes]
    for kind, tree, dtype in [*old, *now]:
        if tree not in options.trees:
            continue
        job = {**common, "kind": kind, "tree": tree, "options": {**chosen, "dtype": dtype}}
        yield {**job, "dtype": dtype, "part": "decoder", "layers": options.layers}


def _memory_apart(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the runs that say what memory is held, and in which stage."""
    for dtype in _narrow_base(options.dtypes or ("bf16",)):
        for layers, rows in ((0, 1), *((options.layers, rows) for rows in ROWS_TRIED)):
            job = {**_decoder_files(options, layers), "kind": "memory", "tree": "new"}
            chosen = {**_decoder_options(options), "batch": rows, "held_out": rows, "dtype": dtype}
            yield {**job, "dtype": dtype, "part": "memory", "layers": layers, "options": chosen}


def held_of_checkpoint(runs: Sequence[Mapping[str, Any]]) -> float:
    """Return what is held beside packages and activations, over the checkpoint's bytes.

    Args:
        runs: those of the part `memory` in one type.
    """
    small = next(run for run in runs if not run["layers"])
    large = [run for run in runs if run["layers"]]
    rows = [run["options"]["batch"] for run in large]
    _, held = np.polyfit(rows, [run["peak_gb"] for run in large], 1)
    return float((held - small["peak_gb"]) / large[0]["checkpoint_gb"])


def _narrow_base(dtypes: Sequence[str]) -> list[str]:
    """Leave out the type that is for a base in float32."""
    return [dtype for dtype in dtypes if dtype != "mixed"]


def _decoder_files(options: argparse.Namespace, layers: int) -> dict[str, str]:
    """Make the decoder's files where they are missing; say where they lie.

    Args:
        options: of the command line.
        layers: of the decoder; 0 for one of a few kilobytes.
    """
    work = options.work.resolve() / ("" if layers else "small")
    work.mkdir(exist_ok=True)
    base, tuned, inputs = work / "base", work / "tuned", work / "tokens.npz"
    if not (tuned / "config.json").exists():
        _make_decoder(base, tuned, layers)
    draws = np.random.default_rng(0)
    np.savez(inputs, input_ids=draws.integers(0, WORDS if layers else SMALL, (24, TOKENS)))
    return {"base": str(base), "tuned": str(tuned), "inputs": str(inputs), "out": str(work)}


def _decoder_options(options: argparse.Namespace) -> dict[str, Any]:
    steps = 2 if options.quick else options.steps
    return {"budget": 50_000, "steps": steps, "batch": ROWS, "held_out": ROWS}


def _make_decoder(base: Path, tuned: Path, layers: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=WORDS if layers else SMALL,
        hidden_size=576 if layers else 48,
        intermediate_size=1536 if layers else 128,
        num_hidden_layers=layers or 1,
        num_attention_heads=9 if layers else 3,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(base)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "embed" not in name:
                weight.add_(0.004 * torch.randn_like(weight))
    model.save_pretrained(tuned)


def _sets(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the runs on the shared sets, each teacher trained first."""
    from fidelity_task import base_folder, read_task, train_teacher

    sets = options.sets[:1] if options.quick else options.sets
    for seed, name in product(options.seeds, sets):
        task = read_task(options.data / f"{name}.jsonl.gz")
        place = options.work.resolve() / f"{name}-{seed}"
        place.mkdir(exist_ok=True)
        (place / "inputs.txt").write_text("\n".join(task.train.texts) + "\n")
        (place / "labels.txt").write_text("\n".join(task.names) + "\n")
        if not (place / "teacher").exists():
            train_teacher(task, place / "teacher", seed)
        common = {
            "base": str(base_folder()),
            "tuned": str(place / "teacher"),
            "inputs": str(place / "inputs.txt"),
            "out": str(place),
        }
        labels = str(place / "labels.txt")
        fixed = {"labels": labels, "max_length": 48, "budget": 12_000, "seed": seed}
        old, tried = (2, [2]) if options.quick else (800, options.tried)
        new = [("new", *one) for one in product(tried, options.dtypes or ["fp32"])]
        for tree, steps, dtype in [("old", old, "fp32"), *new]:
            if tree not in options.trees:
                continue
            job = {**common, "kind": "compress", "tree": tree, "part": name, "dtype": dtype}
            # Results from before there was a choice do not name the type, which was float32.
            typed = {} if dtype == "fp32" else {"dtype": dtype}
            rows = {"batch": options.batch} if options.batch and tree == "new" else {}
            chosen = {**fixed, "steps": steps, **typed, **rows}
            yield {**job, "seed": seed, "steps": steps, "options": chosen}


def _on_tests(job: Mapping[str, Any], data: Path) -> dict[str, float]:
    """Compare a run's file with its teacher on the test texts, and remove the file."""
    from fidelity_task import TEMPERATURE, base_folder, embed_all, open_encoder, read_task

    import kilodelta

    task = read_task(data / f"{job['part']}.jsonl.gz")
    head = embed_all(*open_encoder(base_folder()), task.names)
    file = Path(job["out"]) / FILE
    with tempfile.TemporaryDirectory() as merged:
        kilodelta.merge(base_folder(), file, Path(merged) / "model")
        models = [open_encoder(Path(folder)) for folder in (f"{merged}/model", job["tuned"])]
    ours, theirs = (
        (TEMPERATURE * embed_all(*model, task.test.texts) @ head.T).double().log_softmax(-1)
        for model in models
    )
    file.unlink()
    return {
        "test_agreement": round(
            100 * float((ours.argmax(-1) == theirs.argmax(-1)).double().mean()), 2
        ),
        "test_divergence": round(float((theirs.exp() * (theirs - ours)).sum(-1).mean()), 4),
    }


def _child(job: Mapping[str, Any]) -> None:
    """Do one job, and print its numbers as the last line."""
    _forget_peak()  # right after fork a child counts its parent's peak as its own
    sys.path.insert(0, str(Path(__file__).parent))
    kinds = {"compress": _compress, "peft": _peft, "memory": _memory_of_stages}
    print(json.dumps(kinds[job["kind"]](job)))


def _forget_peak() -> None:
    """Let the system count this process's peak of resident memory anew."""
    Path("/proc/self/clear_refs").write_text("5")


def _peak() -> float:
    """Return this process's peak of resident memory so far, GB."""
    return _memory("VmHWM", "self")


def _memory(name: str, process: int | str) -> float:
    """Return a figure of a process's memory, GB; 0 of one that has just ended."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return 1024 * next((int(x.split()[1]) for x in lines if x.startswith(name)), 0) / 1e9


def _compress_of_build() -> tuple[Any, Any]:
    """Return `Options` and `compress` of the build on the path; the old one has no short names."""
    package = import_module("kilodelta.compress")
    if hasattr(package, "Options"):
        return package.Options, package.compress
    line, options = (
        import_module(f"{package.__name__}.{name}") for name in ("compress", "options")
    )
    return options.Options, line.compress


def _compress(job: Mapping[str, Any]) -> dict[str, Any]:
    Options, compress = _compress_of_build()
    imported = _peak()
    known = {field.name for field in fields(Options)}
    chosen = {"dtype": job["dtype"], **job["options"]}
    options = Options(**{k: v for k, v in chosen.items() if k in known})
    times: list[float] = []
    busy: list[float] = []
    before: list[float] = []

    def watch(event: Any) -> None:
        if event.stage == "distil":
            times.append(time.monotonic())
            busy.append(time.process_time())
        elif not times:
            before[:] = [_peak()]

    out, began = Path(job["out"]) / FILE, time.monotonic()
    out.unlink(missing_ok=True)  # replacing one is asked for in different ways
    report = compress(
        job["base"], job["tuned"], out, inputs=job["inputs"], options=options, progress=watch
    )
    return {
        "imports_gb": round(imported, 3),
        "before_first_step_gb": round(before[-1], 3) if before else None,
        "peak_gb": round(_peak(), 3),
        "step_s": _median([b - a for a, b in pairwise(times)]),
        "step_processor_s": _median([b - a for a, b in pairwise(busy)]),
        "train_s": round(report.seconds, 2),
        "train_processor_s": round(busy[-1] - busy[0], 2),
        "total_s": round(time.monotonic() - began, 2),
        "agreement": report.after.agreement if report.after else None,
        "divergence": report.after.divergence if report.after else None,
    }


def _memory_of_stages(job: Mapping[str, Any]) -> dict[str, Any]:
    """Compress, and say what was held in each stage."""
    from kilodelta.compress import Options, compress

    peaks: dict[str, float] = {}
    stage = "begin"

    def watch(event: Any) -> None:
        nonlocal stage
        if event.stage != stage:
            _close(peaks, stage)
            stage = event.stage

    _forget_peak()
    options = Options(**job["options"])
    out = Path(job["out"]) / f"memory-{os.getpid()}.kd"
    compress(job["base"], job["tuned"], out, inputs=job["inputs"], options=options, progress=watch)
    _close(peaks, stage)
    out.unlink()
    checkpoint = sum(f.stat().st_size for f in Path(job["base"]).glob("*.safetensors")) / 1e9
    return {
        "peak_gb": max(peaks.values()),
        "checkpoint_gb": round(checkpoint, 3),
        "peaks_by_stage_gb": peaks,
    }


def _close(peaks: dict[str, float], stage: str) -> None:
    """Note the peak of a stage that has ended; one that comes again keeps its larger peak."""
    peaks[stage] = max(peaks.get(stage, 0.0), round(_peak(), 3))
    _forget_peak()


def _median(seconds: list[float]) -> float:
    return round(sorted(seconds)[len(seconds) // 2], 3)


def _peft(job: Mapping[str, Any]) -> dict[str, Any]:
    """Train PEFT's LoRA r = 8 on every linear layer, on the same tokens."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    imported = _peak()
    dtype = torch.bfloat16 if job["dtype"] == "bf16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(job["base"], dtype=dtype, use_cache=False)
    wrapped = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-4)
    before = _peak()
    ids = torch.from_numpy(np.load(job["inputs"])["input_ids"])
    seconds, busy = [], []
    for step in range(job["options"]["steps"]):
        began, used = time.monotonic(), time.process_time()
        batch = ids[step % 5 * ROWS :][:ROWS]
        optimiser.zero_grad()
        wrapped(input_ids=batch, labels=batch).loss.backward()
        optimiser.step()
        seconds.append(time.monotonic() - began)
        busy.append(time.process_time() - used)
    return {
        "imports_gb": round(imported, 3),
        "before_first_step_gb": round(before, 3),
        "peak_gb": round(_peak(), 3),
        "step_s": _median(seconds),
        "step_processor_s": _median(busy),
    }


PARTS = {"decoder": _decoder, "memory": _memory_apart, "sets": _sets}

if __name__ == "__main__":
    main()
