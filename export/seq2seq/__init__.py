"""Export encoder-decoders as two graphs: the encoder, run once, and the decoder, run per step.

`halves.py` makes the graphs, with or without the decoder's cache. `trial.py` runs both one after
the other before they are called done.
"""
