"""What a model is given: opened without torch, then turned into batches and checked.

`sources.py` tells which kind of input a path or a function is, `texts.py` reads lines of text;
`read.py` makes batches of a source, `check.py` refuses by name what the model does not take, and
`examples.py` makes inputs up where none are at hand.
"""
