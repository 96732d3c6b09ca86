"""Compress a fine-tuned model into a file of kilobytes: `kilodelta.compress.compress`.

`changes/` says what differs and how it travels, `job/` settles the rest before the first step,
`learn/` distils, and `compress` builds, measures and writes. Options and the budget's rule need no
torch.
"""
