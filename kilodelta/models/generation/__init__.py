"""What generating models have beside inputs and outputs: a cache, prompts, and special tokens."""
