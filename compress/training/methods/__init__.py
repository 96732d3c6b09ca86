"""Compute each method's update in torch, differentiably: one file for each method."""
