"""Distillation: inputs as rows, the teacher's outputs on them, what counts as equal, the loop."""
