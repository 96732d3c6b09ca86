"""Export ONNX graphs whose weights keep their names, and read ONNX files without `onnx`."""
