"""VeRA: two random sign matrices shared by all layers, scaled by two trained vectors per layer."""
