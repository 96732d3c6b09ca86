"""Read and write tensors, checkpoints and their identity; write results in full or not at all.

Nothing here knows what a delta is. Everything that is read is untrusted and checked field by
field; everything that is written takes its name only when it is whole.
"""
