"""Figures on the pages are those of committed results: what a benchmark printed, nothing else."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from tests.support.processes import ROOT

RESULTS = ROOT / "benchmarks" / "results"
README, NUMBERS = ROOT / "README.md", ROOT / "docs" / "numbers.md"


def result(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def row(page: Any, start: str) -> str:
    """The one line of a table that begins so."""
    (line,) = (line for line in page.read_text().splitlines() if line.startswith(f"| {start} |"))
    return str(line)


FIDELITY = result("fidelity-2026-11-26-xeon-1-thread")["sets"]
TRAINING = result("training-2026-11-26-xeon-1-thread")["models"]
DECODE = [result(f"decode-2026-11-26-xeon-{n}-thread{s}")["rows"] for n, s in ((1, ""), (2, "s"))]
APPLY = [result(f"{name}-2026-11-26-xeon")["rows"] for name in ("apply", "apply-device")]
NAMES = {
    "base": "base",
    "`--budget 4KB`": "4KB",
    "`--budget 12KB`": "12KB",
    "`--budget 25KB`": "25KB",
    "LoRA r = 1, int4, distilled alike": "lora-r1-int4",
    "`--budget 50KB`": "50KB",
    "the full fine-tune": "teacher",
}


@pytest.mark.parametrize("page", [README, NUMBERS], ids=["README", "numbers"])
@pytest.mark.parametrize("start", NAMES)
def test_what_kilobytes_keep(page: Any, start: str) -> None:
    if page == README and NAMES[start] in ("25KB", "lora-r1-int4"):
        pytest.skip("README has the shorter table")
    line = row(page, start)
    for name in ("trec6", "banking77"):
        points = [seed[NAMES[start]] for seed in FIDELITY[name].values()]
        shown = [f"{point['accuracy']:.1f}" for point in points]
        assert (shown[0] if start == "base" else " / ".join(shown)) in line
        if "bytes" in points[0]:
            assert f"{points[0]['bytes']:,}" in line
    svd = [
        seed.get(f"svd-int4-{k}x{NAMES[start]}")
        for k in (1, 10)
        for seed in FIDELITY[name].values()
    ]
    if page == NUMBERS and svd[0]:
        one, other, ten, tens = (f"{point['accuracy']:.1f}" for point in svd)
        assert f"{one} / {other}, {ten} / {tens}" in line


GRIDS = result("quantised-1200-steps-2026-11-30-epyc-avx512-busy")["sets"]
QUANTISED = tuple(GRIDS[name][seed] for name in ("trec6", "banking77") for seed in "01")
"""In the order of the tables."""
PRECISIONS = ("int4-g32", "nvfp4")
GUIDE = ROOT / "docs" / "quantised.md"
BASES = ROOT / "docs" / "bases.md"


@pytest.mark.parametrize(
    ("page", "start", "key", "floats"),
    [
        (README, "the base alone", "base", "base"),
        (README, "merged", "in-grid", "12KB"),
        (README, "beside the base", "beside", None),
        (GUIDE, "the base", "base", "base"),
        (GUIDE, "11,952 bytes merged in the grid", "in-grid", "12KB"),
        (GUIDE, "11,952 bytes beside the quantised base", "beside", None),
        (GUIDE, "full fine-tune merged in the grid, scales kept", "full-in-grid", "teacher"),
        (GUIDE, "full fine-tune, quantised anew", "full-quantised", None),
    ],
)
def test_what_a_grid_keeps(page: Any, start: str, key: str, floats: str | None) -> None:
    assert all(run["bytes"] == 11_952 for run in QUANTISED)
    columns = [("int4-g32", key), ("nvfp4", key), ("float", floats)]
    shown = [
        "" if cell is None else " / ".join(f"{run[column][cell]:.1f}" for run in QUANTISED)
        for column, cell in columns
    ]
    cells = [cell.strip() for cell in row(page, start).strip("|").split("|")]
    assert cells[1:] == shown


def test_what_a_grid_loses() -> None:
    page = " ".join(GUIDE.read_text().split())

    def lost(run: Any, precision: str, way: str) -> float:
        return float(run["float"]["12KB"] - run[precision][way])

    pairs = [
        [np.mean([lost(run, p, "in-grid") for run in GRIDS[name].values()]) for p in PRECISIONS]
        for name in ("trec6", "banking77")
    ]
    (a, b), (c, d) = pairs
    told = f"loses {a:.1f} points in INT4 and {b:.1f} in NVFP4 on TREC-6, and {c:.1f} and {d:.1f}"
    assert f"{told} on Banking77" in page
    means = [
        np.mean([lost(run, p, "beside") for run in GRIDS[name].values()])
        for name in GRIDS
        for p in PRECISIONS
    ]
    assert f"beside the base it loses {max(means):.1f} at most" in page
    each = sorted(lost(run, p, "in-grid") for run in QUANTISED for p in PRECISIONS)
    assert f"seven of eight stay within {each[-2]:.2f} points in their grid" in page
    assert f"loses {each[-1]:.1f} in NVFP4" in page
    before = result("quantised-banking77-seed-1-2026-11-29-epyc-avx512-busy")["sets"]["banking77"]
    worse = " and ".join(f"{lost(before['1'], p, 'in-grid'):.2f}" for p in PRECISIONS)
    assert f"the second seed of Banking77 lost {worse}" in page


SMOLLM2 = list(
    result("quantised-smollm2-150-steps-2026-11-29-epyc-avx512-busy")["sets"]["smollm2"].values()
)
"""One seed after the other."""


def gain(cells: Any, name: str, key: str) -> str:
    """The share of the full fine-tune's gain."""
    low, high = cells["base"][key], cells["teacher"][key]
    return f"{(cells[name][key] - low) / (high - low):.2f}"


@pytest.mark.parametrize(
    ("start", "name"),
    [
        ("SmolLM2-135M-Instruct, Q4_1", "base"),
        ("merged in the grid", "in-grid"),
        ("beside the quantised base", "beside"),
        ("merged into the base's values as floats", "float"),
        ("the full fine-tune, floats", "teacher"),
        ("the full fine-tune merged in the grid, scales kept", "full-in-grid"),
    ],
)
def test_what_a_packaged_decoder_keeps(start: str, name: str) -> None:
    shown = []
    for key, form in (("score", ".1f"), ("loss", ".2f")):
        shown.append(" / ".join(f"{cells[name][key]:{form}}" for cells in SMOLLM2))
        shares = [] if name == "base" else [gain(cells, name, key) for cells in SMOLLM2]
        shown.append(" / ".join(shares))
    cells = [cell.strip() for cell in row(GUIDE, start).strip("|").split("|")]
    assert cells[1:] == shown


def test_the_triple_of_a_packaged_decoder() -> None:
    ways = ("in-grid", "beside", "float")
    page = " ".join(GUIDE.read_text().split())
    for key, unit in (("loss", "loss"), ("score", "exact match")):
        triples = [" / ".join(gain(cells, name, key) for name in ways) for cells in SMOLLM2]
        assert f"{' and '.join(triples)} by {unit}" in page
        cells = [cell.strip() for cell in row(README, f"by {unit}").strip("|").split("|")]
        assert cells[1:] == [" / ".join(gain(c, name, key) for c in SMOLLM2) for name in ways]
    for other in ("-80-steps", "-near-zero", ""):
        runs = result(f"quantised-smollm2{other}-2026-11-29-epyc-busy")["sets"]["smollm2"].values()
        first, *second = [" / ".join(gain(run, name, "score") for name in ways) for run in runs]
        assert f"{first} of the gain" in page
        assert all(f"{triple} on the second seed" in page for triple in second)
    changed = " / ".join(f"{cells['codes changed']:.1f}" for cells in SMOLLM2)
    assert f"{changed} % of the codes change" in page
    sizes = dict.fromkeys(f"{cells['bytes']:,}" for cells in SMOLLM2)
    packaged = f"SmolLM2-135M as packaged (GGUF, Q4_1), {' / '.join(sizes)} bytes"
    assert packaged in " ".join(README.read_text().split())


def test_a_merge_in_the_grid_beside_a_copy() -> None:
    found = result("grid-merge-2026-11-29-epyc-avx512-2gb-pairs")
    page = " ".join(GUIDE.read_text().split())
    assert f"{found['times a copy']['merge']['seconds']} times a plain copy" in page
    seconds = " / ".join(f"{run['merge']['seconds']:.1f}" for run in found["runs"])
    assert f"took {seconds} s on an idle machine" in page
    for name, key, words in (
        ("merge before", "seconds", "the version before, by turns, took"),
        ("merge", "processor seconds", "In processor seconds it was"),
        ("merge before", "processor seconds", "after"),
        ("merge of floats", "seconds", "of float16 took"),
    ):
        values = [run[name][key] for run in found["runs"]]
        assert f"{words} {min(values):.1f} to {max(values):.1f}" in page
    most = max(run["merge"]["anonymous MB"] for run in found["runs"])
    assert f"with {most:.0f} MB of anonymous memory" in page


def kept(seeds: Any, name: str, figure: str = "score") -> list[str]:
    """Bytes, figures and shares of the fine-tune's gain as a table shows them: one per seed."""
    runs = [cells for cells in seeds.values() if name in cells]
    sizes = dict.fromkeys(f"{cells[name]['bytes']:,}" for cells in runs if "bytes" in cells[name])
    shares = []
    for cells in runs:
        low, high = cells["base"]["score"], cells["teacher"]["score"]
        shares.append(f"{100 * (cells[name]['score'] - low) / (high - low):.0f} %")
    shown = [f"{cells[name][figure]:.1f}" for cells in runs]
    return [" / ".join(part) for part in (sizes, shown, [] if name == "base" else shares)]


SPEECH = result("models-speech-2026-11-29-epyc-busy")["tasks"]["speech"]


@pytest.mark.parametrize(
    ("start", "name"),
    [
        ("Whisper-base", "base"),
        ("the full fine-tune, 60 steps of 8", "teacher"),
        ("`--budget 50KB`", "kd"),
        ("truncated SVD of its change, int4", "svd"),
        ("LoRA r = 1 of PEFT, int8", "lora-r1-int8"),
        ("LoRA r = 8 of PEFT, int8", "lora-r8-int8"),
    ],
)
def test_what_is_heard(start: str, name: str) -> None:
    shown = kept(SPEECH, name, "word_error_rate")
    assert [cell.strip() for cell in row(BASES, start).strip("|").split("|")][1:] == shown
    if name == "kd":
        line = row(README, "Whisper, T5 and other encoder-decoders")
        assert f"{shown[2]} of the gain in 50 KB" in line
        assert f"to {shown[1]} %" in line


DECODER = result("models-decoder-2026-11-29-epyc-busy")["tasks"]["decoder"]


@pytest.mark.parametrize(
    ("start", "name"),
    [
        ("SmolLM2", "base"),
        ("its full fine-tune, 50 steps of 8", "teacher"),
        ("`--budget 50KB`, 120 steps of 8", "kd"),
        ("truncated SVD of its change, 4 bits", "svd"),
        ("PEFT's LoRA r = 1, int8", "lora-r1-int8"),
        ("PEFT's LoRA r = 8, int8", "lora-r8-int8"),
    ],
)
def test_what_questions_ask_for(start: str, name: str) -> None:
    shown = kept(DECODER, name)
    assert [cell.strip() for cell in row(BASES, start).strip("|").split("|")][1:] == shown
    if name == "kd":
        line = row(README, "decoders such as GPT-2, Llama, Qwen")
        assert f"{shown[2]} of the gain in 50 KB" in line
        assert f"to {shown[1]} %" in line


def test_what_llama_cpp_writes() -> None:
    found = result("llama-cpp-2026-11-29-epyc-busy")
    count = found["prompts"]
    assert found["quantised"]["equal"] == found["float32"]["equal"] == count
    text = " ".join(BASES.read_text().split())
    assert f"wrote the merged model's text for {count} of {count} prompts" in text
    assert f"without the LoRA for {found['float32 without the LoRA']['equal']} (" in text


VISION = result("models-vision-2026-11-29-epyc-busy")["tasks"]
LONGER = result("models-vision-300-steps-2026-11-29-epyc-busy")["tasks"]
SECOND = result("models-vision-second-seed-2026-11-29-epyc-busy")["tasks"]
"""Seed 1 of few images, whose file was made in 300 steps."""


@pytest.mark.parametrize(
    ("start", "name"),
    [
        ("the base, nearest mean", "base"),
        ("the full fine-tune", "teacher"),
        ("`--budget 25KB`", "kd"),
        ("`--budget 25KB`, 300 steps", "kd"),
        ("truncated SVD of the change, int4", "svd"),
        ("NOLA r = 8, int4, on the labels", "nola-int4"),
        ("RandLoRA r = 384, int4, on the labels", "randlora-int4"),
        ("PEFT LoRA r = 1, int8", "lora-r1-int8"),
        ("PEFT LoRA r = 8, int8", "lora-r8-int8"),
    ],
)
def test_what_a_few_images_teach(start: str, name: str) -> None:
    run = LONGER if "300 steps" in start else VISION
    beside = {} if run is VISION and name == "kd" else SECOND
    tasks = [f"vision-{shots}" for shots in (16, 4, 1)]
    columns = [kept({**run.get(task, {}), **beside.get(task, {})}, name) for task in tasks]
    shown = [f"{at} ({share})" if share else at for _, at, share in columns]
    sizes = {size for sizes, _, _ in columns for size in sizes.split(" / ")}
    if name not in ("base", "teacher"):
        sizes.discard("")  # of a column that was not run
    cells = [cell.strip() for cell in row(BASES, start).strip("|").split("|")]
    assert cells[1:] == [" to ".join(sorted(sizes)[:: max(1, len(sizes) - 1)]), *shown]
    if run is LONGER:
        assert f"{columns[0][2]} of the gain in 25 KB" in row(README, "ViT, ResNet")


@pytest.mark.parametrize(
    ("start", "what"),
    [
        ("NOLA r = 8, k = 256, beside PEFT LoRA r = 8", "NOLA: PEFT LoRA r = 8"),
        ("the same beside the official NOLA layer", "NOLA: official NOLA"),
        ("RandLoRA r = 32 beside PEFT RandLora", "RandLoRA: PEFT RandLora"),
        ("VeRA r = 256 beside PEFT VeRA", "VeRA: PEFT VeRA"),
        ("LoRA r = 8 beside PEFT LoRA r = 8", "LoRA r = 8: PEFT LoRA r = 8"),
    ],
)
def test_training_steps(start: str, what: str) -> None:
    line = row(NUMBERS, start)
    for model in TRAINING.values():
        for measured in (one for one in model if one["what"] == what):
            # Half a unit of the last digit shown, since 0.675 may be rounded either way.
            shown = [f"{measured['ratio'] + e:.2f}x" for e in (-1e-3, 0, 1e-3)]
            assert any(text in line for text in shown), (what, measured)


def test_merging() -> None:
    text = NUMBERS.read_text()
    for rows in DECODE:
        for number, form in ((0, ".0f"), (1, ".1f"), (2, ".1f"), (3, ".1f")):
            assert f"**{rows[number]['ratio']:{form}}x**" in text
        assert f"{rows[4]['ratio']:.2f}x" in text
        copied = rows[5]
        assert f"{1 / copied['ratio']:.1f}x its time ({copied['kilodelta']:.1f} s)" in text
        assert f"{rows[7]['kilodelta']:.0f} MB" in text


def test_on_a_device() -> None:
    text = " ".join(NUMBERS.read_text().split())
    (first, second) = ({one["what"]: one for one in rows} for rows in APPLY)
    for mode in ("adapter", "patch"):
        what = f"{mode}: apply with probe, against merging, exporting and opening anew"
        assert f"{first[what]['measured']:.2f} and {second[what]['measured']:.2f} s in" in text
        for one in (first, second):
            assert f"{one[what]['ratio']:.1f}x" in text
    what = "adapter: request at batch 4, 64 tokens, against the merged model's time"
    times = [one[what]["measured"] / one[what]["against"] for one in (first, second)]
    assert f"{times[0]:.2f}x and {times[1]:.2f}x the merged model's time" in text
    what = "adapter: switch to a new .kd, 36 matrices, NOLA rank 8, k = 256"
    assert f"{first[what]['measured']:.1f} and {second[what]['measured']:.1f} ms" in text


PATCH = ROOT / "docs" / "patch.md"
CODES = result("rtx-codes-survey-2026-11-29-epyc-busy")["rows"]
CODES_NVFP4 = [
    one
    for name in ("nvfp4", "nvfp4-rest")
    for one in result(f"rtx-codes-survey-{name}-2026-11-29-epyc-avx512-busy")["rows"]
]


@pytest.mark.parametrize("model", sorted({row["model"] for row in CODES}))
def test_which_codes_of_an_engine_have_a_place(model: str) -> None:
    of_halves = [*CODES, *(row for row in CODES_NVFP4 if row["dtype"] == "float16")]
    rows = {row["codes"]: row for row in of_halves if row["model"] == model}
    shown = [placed_of(rows.get(codes)) for codes in ("int4-g32", "fp8", "nvfp4")]
    cells = [cell.strip() for cell in row(PATCH, f"`{model}`").strip("|").split("|")]
    is_build = all(row.get("bytes_that_differ", 0) == 0 for row in rows.values())
    assert cells[1:] == [*shown, "0" if is_build else "refuted"]


def placed_of(one: Any) -> str:
    """The weights of an engine that have a place, of all."""
    if one is None or "refused" in one:
        return "not measured" if one is None else "refused"
    return f"{one['weights_placed']} of {one['weights']}"


def test_how_often_an_engine_of_codes_has_a_map() -> None:
    mapped = [row for row in CODES if "refused" not in row]
    every, placed = (sum(row[key] for row in mapped) for key in ("weights", "weights_placed"))
    page = PATCH.read_text()
    assert f"{len(mapped)} of {len(CODES)} engines have a map, {placed} of their {every}" in page
    built = sum(row["bytes_that_differ"] == 0 for row in mapped)
    assert f"in {built} of them a fine-tune of all of those, patched, is a build" in page
    models = {row["model"] for row in CODES}
    assert f"linear layers, {len(models)} were measured" in page


CODES_FLOAT32 = result("rtx-codes-survey-float32-2026-11-29-epyc-avx512-busy")["rows"]


def test_engines_of_codes_that_compute_in_float32() -> None:
    page = PATCH.read_text()
    mapped = [row for row in CODES_FLOAT32 if "refused" not in row]
    every, placed = (sum(row[key] for row in mapped) for key in ("weights", "weights_placed"))
    built = sum(row["bytes_that_differ"] == 0 for row in mapped)
    rows = len(CODES_FLOAT32)
    assert f"{len(mapped)} of {rows} engines have a map, {placed} of {every} weights a" in page
    assert f"and {built} fine-tunes of {rows}, patched, are their builds" in page
    names = sorted({row["model"] for row in CODES_FLOAT32})
    assert ", ".join(f"`{name}`" for name in names[:-1]) + f" and `{names[-1]}`" in page


@pytest.mark.parametrize(
    "one",
    [
        one
        for name in ("float32", "float32-fp8-nvfp4")
        for one in result(f"rtx-codes-minilm-{name}-2026-11-29-epyc-avx512-busy")["rows"]
    ],
)
def test_the_real_model_s_engine_of_codes(one: Any) -> None:
    called = {"int4-g32": "INT4", "fp8": "FP8", "nvfp4": "NVFP4"}[one["codes"]]
    assert (
        f"in {called} {one['weights_placed']} of {one['weights']} weights have a place and"
        f" {one['bytes_that_differ']} of {one['engine_bytes']:,} bytes differ"
    ) in PATCH.read_text()


def test_engines_of_nvfp4_codes() -> None:
    page, rows = PATCH.read_text(), len(CODES_NVFP4)
    mapped = [row for row in CODES_NVFP4 if "refused" not in row]
    keys = ("weights", "weights_placed", "copies", "transposed", "scales_in_the_engine")
    every, placed, copies, turned, scales = (sum(row[key] for row in mapped) for key in keys)
    halves = sum(row["dtype"] == "float16" for row in CODES_NVFP4)
    assert f"{len(mapped)} of {rows} engines have a map ({halves} in float16" in page
    assert f"{rows - halves} in float32), {placed} of {every} weights a place" in page
    built = sum(row["bytes_that_differ"] == 0 for row in mapped)
    assert f"{built} fine-tunes of {rows}, patched, are their builds." in page
    assert f"{turned} of {copies} lie transposed, and the scales of {scales} are read" in page


KEPT = result("rtx-codes-2026-11-29-epyc-avx512-busy")["rows"]


def test_an_engine_holds_nvfp4_as_bytes() -> None:
    """The page says that codes and scales lie in the order of the network's own constants."""
    rows = [row for row in KEPT if row["codes"] == "nvfp4" and "refused" not in row]
    assert [(row["for"], row["dtype"]) for row in rows] == [
        ("sm120", "float16"),
        ("sm120", "float32"),
    ]
    assert {where for row in rows for where in (*row["found"], *row["scales"])} == {"as it is"}
    assert "NVFP4 codes lie two to a byte, the first one low" in PATCH.read_text()


EXPORTED = result("quantised-export-2026-11-29-epyc-busy")


@pytest.mark.parametrize(
    ("step", "start"),
    [
        ("export --onnx", "`export --onnx` of the GGUF file: 114.3 MB, `MatMulNBits` with minima"),
        ("verify", "`verify` on ONNX Runtime, float32"),
        ("quantise anew", "`quantise_folder`, INT4 in groups of 32"),
        ("rebase", "`rebase`"),
        (
            "export --tensorrt sm89",
            "`export --onnx --tensorrt sm89 --dtype fp16`: 141.7 MB",
        ),
        ("verify of the engine's graph", "`verify` of its graph on ONNX Runtime, float16"),
    ],
)
def test_a_packaged_decoder_to_graph_and_engine(step: str, start: str) -> None:
    line = row(GUIDE, start)
    (one,) = (one for one in EXPORTED["steps"] if one["step"] == step)
    assert f"| {one['processor_seconds']:.1f} | {one['peak_mb'] / 1000:.1f} GB |" in line
    for ran in one.get("parity", ()):
        if ran["artefact"].endswith(".onnx") and ran["status"] == "passed":
            assert line.endswith(f"| {ran['error']:.1e} ({ran['limit']:.1e}) |")
    sizes = {name: f"{size / 1e6:.1f} MB" for name, size in EXPORTED["bytes"].items()}
    if step.startswith("export"):
        engine = "tensorrt" in step
        assert sizes["rtx/model.fp16.engine" if engine else "onnx/model.fp32.onnx"] in line


@pytest.mark.parametrize(
    ("name", "dtype", "start"),
    [
        (
            "mapped",
            "fp32",
            "`--dtype fp32`, weights in the mapped file"
            " (`compress-decoder-2026-11-29-epyc-mapped.json`)",
        ),
        ("mapped-again", "fp32", "the same, run again (`...-mapped-again.json`)"),
        ("memory", "fp32", "`--dtype fp32`, weights copied, before (`...-memory.json`)"),
        (
            "memory-apart",
            "fp32",
            "`--dtype fp32`, weights copied, blocks mapped apart, before (`...-memory-apart.json`)",
        ),
        ("avx512", "bf16", "`--dtype bf16`, with units for it, idle (`...-avx512.json`)"),
        ("avx512", "fp32", "`--dtype fp32`, the same machine, idle (`...-avx512.json`)"),
    ],
)
def test_memory_of_a_decoder_beside_peft(name: str, dtype: str, start: str) -> None:
    runs = result(f"compress-decoder-2026-11-29-epyc-{name}")["runs"]
    ours, peft = (run for run in runs if run["dtype"] == dtype)
    line = row(NUMBERS, start)
    times = ours["step_processor_s"] / peft["step_processor_s"]
    assert f"{ours['step_processor_s']:.1f} s, {times:.2f} times PEFT's" in line
    share = ours["peak_gb"] / peft["peak_gb"]
    assert f"{ours['peak_gb']:.2f} GB, {share:.2f} times PEFT's" in line
    assert line.endswith(f"| {ours['peak_anonymous_gb']:.2f} GB |")
    if name == "avx512":
        clock = f"{ours['step_s']:.2f} s in {'bfloat16' if dtype == 'bf16' else 'float32'}"
        assert f"{clock}, {ours['step_s'] / peft['step_s']:.2f} times" in NUMBERS.read_text()


def test_half_the_steps_beside_the_build_before() -> None:
    runs = result("compress-sets-seed-1-2026-11-29-epyc-avx512")["runs"]
    for part, name in (("trec6", "TREC-6"), ("banking77", "Banking77")):
        old, *new = (run for run in runs if run["part"] == part)
        for run in (old, *new):
            times = [
                f", {run[key] / old[key]:.2f} times" if run is not old else ""
                for key in ("train_s", "step_s")
            ]
            made = "the build before, 800" if run is old else "this one, 500"
            start = f"{name}, {made} steps" + ("" if run is old else f", `{run['dtype']}`")
            cells = [cell.strip() for cell in row(NUMBERS, start).strip("|").split("|")]
            assert cells[1:] == [
                f"{run['train_s']:.0f} s{times[0]}",
                f"{run['step_s']:.3f} s{times[1]}",
                f"{100 * run['agreement']:.1f} %",
                f"{run['test_agreement']:.1f} %",
                f"{run['test_divergence']:.3f}",
            ]


@pytest.mark.parametrize(
    ("name", "count", "before", "now"),
    [
        ("hard-rows", 6, "the build before, 800 steps", "this one, 520 steps"),
        ("int8", 8, "the build before, run again", "this one, 700 steps"),
    ],
)
def test_what_half_the_time_gives(name: str, count: int, before: str, now: str) -> None:
    runs = result(f"compress-sets-{name}-2026-11-30-epyc-avx512")["runs"]
    assert len(runs) == count
    for run in runs:
        task = {"trec6": "TREC-6", "banking77": "Banking77"}[run["part"]]
        like = {"part": run["part"], "seed": run["seed"], "tree": "old"}
        (old,) = (one for one in runs if {key: one[key] for key in like} == like)
        steps = before if run is old else now
        cells = [
            cell.strip() for cell in row(NUMBERS, f"{task}, seed {run['seed']}, {steps}").split("|")
        ]
        times = [
            f", {run[key] / old[key]:.2f} times" if run is not old else ""
            for key in ("train_s", "step_s")
        ]
        assert cells[2:-1] == [
            f"{run['train_s']:.0f} s{times[0]}",
            f"{run['step_s']:.3f} s{times[1]}",
            cells[4] if "one input fewer" in cells[4] else f"{100 * run['agreement']:.1f} %",
            f"{run['divergence']:.3f}",
            f"{run['test_agreement']:.1f} %",
            f"{run['test_divergence']:.3f}",
        ]
        if "one input fewer" in cells[4]:
            assert cells[4].startswith(f"{100 * run['agreement']:.1f} %")
            assert round(512 * (old["agreement"] - run["agreement"])) == 1


def test_what_a_decoder_s_run_holds_beside_its_activations() -> None:
    runs = result("compress-memory-rows-2026-11-29-epyc-avx512-busy")["runs"]
    (small,) = (run for run in runs if not run["layers"])
    large = [run for run in runs if run["layers"]]
    rows = [run["options"]["batch"] for run in large]
    each, held = np.polyfit(rows, [run["peak_gb"] for run in large], 1)
    page = " ".join(NUMBERS.read_text().split())
    peaks = ", ".join(f"{run['peak_gb']:.2f}" for run in large)
    assert (
        f"the peaks of steps of 2, 4, 6 and 8 rows are {peaks} GB: {1000 * each:.0f} MB a row,"
        f" which are activations, and {held:.2f} GB of no row."
        f" {small['peak_gb']:.2f} GB of that takes the same run on a decoder of a few kilobytes,"
    ) in page
    times = (held - small["peak_gb"]) / large[0]["checkpoint_gb"]
    assert f"the rest is {times:.2f} times the {large[0]['checkpoint_gb']:.2f} GB" in page
