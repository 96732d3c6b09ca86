"""Uni-LoRA: one trained vector for the whole model, scattered into every layer's factors."""
