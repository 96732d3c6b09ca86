#!/usr/bin/env bash
# A float16 graph whose intermediate exceeds 65504 gives a finite, plausible result in ONNX Runtime on
# x86 CPUs, at every optimisation level: nodes without a float16 kernel run in float32, and the casts
# between two of them are dropped, so values between nodes are never float16. Declare the intermediate
# as an output and the session returns inf for it beside a finite result computed "from" it. onnx's
# reference gives inf, as hardware with float16 units would. One guesses: inf, or at least the same
# numbers that the outputs show. onnxruntime 1.32.0, onnx 1.23.2. Met by whoever proves a float16
# export on a build machine before it goes to a GPU.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6
"$work/env/bin/python" -W ignore - <<'PY'
import platform
import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, checker, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

half = TensorProto.FLOAT16
weights = numpy_helper.from_array(np.full((8, 8), 100, np.float16), "W")
scale = numpy_helper.from_array(np.float16(1 / 1024), "c")
nodes = [helper.make_node("MatMul", ["x", "W"], ["p"]), helper.make_node("Mul", ["p", "c"], ["y"])]
value = lambda name: helper.make_tensor_value_info(name, half, [1, 8])
graph = helper.make_graph(nodes, "g", [value("x")], [value("y")], [weights, scale])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
checker.check_model(model)
x = np.full((1, 8), 100, np.float16)  # p = 80000, y = 78.125

def run(level=ort.GraphOptimizationLevel.ORT_ENABLE_ALL):
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [float(array[0, 0]) for array in session.run(None, {"x": x})]

print("onnxruntime", ort.__version__, "onnx", onnx.__version__, platform.machine())
if platform.machine() != "x86_64":
    raise SystemExit("other processors have float16 kernels: not what is shown here")
(optimised,), (plain,) = run(), run(ort.GraphOptimizationLevel.ORT_DISABLE_ALL)
reference = float(ReferenceEvaluator(model).run(None, {"x": x})[0][0, 0])
model.graph.output.append(value("p"))
y, p = run()
print(f"y by onnxruntime: {optimised}, without optimisation {plain}; by onnx's reference {reference}")
print(f"with p as an output: p {p}, and y, which is p / 1024: {y}")
assert np.isinf(reference) and np.isinf(p)
assert 78 < min(optimised, plain, y) <= max(optimised, plain, y) < 79, "it overflows now"
PY
