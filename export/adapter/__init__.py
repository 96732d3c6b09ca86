"""Export one ONNX graph for all fine-tunes of a base: their low-rank factors are its inputs."""
