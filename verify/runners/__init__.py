"""Run one artefact in one runtime: torch, ONNX Runtime or TensorRT, behind one interface.

A `Runner` says why it cannot run here, or computes named outputs from named inputs; it never falls
back to another device in silence. `request.py` times the same runners with inputs on the device.
Devices import the ONNX Runtime and TensorRT runners, so only `torch_runner.py` imports torch.
"""
