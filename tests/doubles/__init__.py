"""Stand-ins for what a test machine lacks: TensorRT, CUDA, a device's runtime."""
