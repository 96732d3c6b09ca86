"""Compare what decoders write in their runtimes with what the merged model writes.

`writers.py` lets ONNX Runtime and ONNX Runtime GenAI write greedily, with the cache. `compare.py`
holds the text, token by token, and the logits at every position against the merged model in
float64, which computes the whole text at once and without a cache.
"""
