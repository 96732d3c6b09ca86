"""Compress a fine-tune: find what changed, spend the budget, distil, and report what was kept."""
