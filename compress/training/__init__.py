"""Train a delta in any PyTorch loop: attach coefficients to a model, train them, save a `.kd`.

`train.py` is what users call, as `kilodelta.train`. `attachment.py` is the module of coefficients
that it hooks into a model, `layers.py` and `encoders.py` are the hooks, and `conversion.py` makes
the delta. How each method computes in torch is in `kilodelta/format/methods/*/train.py`.
"""
