"""Inputs that are no plain texts: images, sounds, and pairs of a source and a target.

`records.py` finds them on disk without torch; `images.py` and `sounds.py` read one file each;
`batches.py` makes what a model takes of them, by the processor in the model's own folder.
"""
