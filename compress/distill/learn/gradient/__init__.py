"""Compute a step's gradient: in pieces, in several processes, and scaled in float16."""
