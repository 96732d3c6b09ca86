"""Train a delta in any PyTorch loop: attach coefficients to a model, train them, save a `.kd`.

`methods/` holds the trainable side of each method; everything else treats all methods alike.
"""
