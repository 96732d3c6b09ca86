"""Build and refit TensorRT engines, by one module for `tensorrt` and `tensorrt_rtx`."""
