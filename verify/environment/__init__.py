"""Say what this machine can do, and the command that installs what it lacks.

`doctor.py` collects the findings, `runtimes.py` asks ONNX Runtime and TensorRT, `packages.py` asks
about packages without importing them here: a broken one may abort, hang or print.
"""
