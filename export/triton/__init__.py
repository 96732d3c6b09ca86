"""Lay an export out as a model repository of Triton Inference Server."""
