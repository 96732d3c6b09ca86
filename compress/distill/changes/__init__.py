"""What a fine-tune changed, and how each change travels: as coefficients, whole, or not at all."""
