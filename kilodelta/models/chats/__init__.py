"""Conversations as inputs: `records` reads them from `.jsonl` without torch, `tokens` frames them
with the tokenizer's chat template and tells which tokens the assistant wrote."""
