"""Read the checkpoints of the official NOLA code, of its GPT-2 and its LLaMA variant."""
