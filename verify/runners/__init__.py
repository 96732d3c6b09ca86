"""Run an artefact in one runtime: torch, ONNX Runtime or TensorRT, behind one interface."""
