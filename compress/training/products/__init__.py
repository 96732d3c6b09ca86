"""How a frozen linear layer multiplies: with a weight as its file stores it, or in bfloat16."""
