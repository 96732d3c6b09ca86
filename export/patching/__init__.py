"""Make the ONNX file of a fine-tune out of its base's, by byte offsets, without torch or onnx."""
